"""Installs the wheel of this Python and machine from dist/ into a fresh environment: python -m wheels.tried [DIST].

PATH has that environment alone, so no compiler. Dependencies are those of the environment that runs this: what is tried
is what the wheel brings. Tests of its C++ ops, merges without PyTorch (`wheels/check.py`) and the demo's must pass.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tests of ops that compute in C++, and compile nothing.
_OPS = "(native or cpp or arrays or threads) and not emulated and not cuda and not triton"


def main(dist: Path = ROOT / "dist") -> None:
    """Install and try the wheel."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted(dist.glob(f"*-{tag}-{tag}-manylinux*{platform.machine()}.whl"))
    if not wheels:
        sys.exit(f"{dist} has no wheel of {tag} for {platform.machine()}; make wheel")
    with tempfile.TemporaryDirectory() as folder:
        environment, checkout = Path(folder, "environment"), Path(folder, "checkout")
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        python = str(environment / "bin/python")
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, str(wheels[-1])], check=True)
        packages = Path(
            subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
        )
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for name in ("tests", "examples", "csrc"):  # without pymerge: the wheel's must be found
            shutil.copytree(ROOT / name, checkout / name)
        shutil.copy(ROOT / "pyproject.toml", checkout)
        variables = {"PATH": str(environment / "bin"), "HOME": folder, "OMP_NUM_THREADS": "2"}
        for command in (
            [python, str(ROOT / "wheels/check.py")],
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", _OPS, "tests/ops"],
            [python, "-m", "examples.glyphs.demo"],
        ):
            print("==", *command[1:], flush=True)
            subprocess.run(command, check=True, cwd=checkout, env=variables)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
