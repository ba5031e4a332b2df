"""Fills .gpu with wheels for a machine with a GPU and without network: `make gpu-bundle PYTHON=python3.12`.

    python3.12 -m benchmarks device bundle

The Python that runs this is the one that the machine must have. The wheels are pymerge's, with the C++ and, where nvcc
is found, the CUDA C++ extension; one of it in pure Python, for a machine with another Python; and what it imports
beside PyTorch, Triton, numpy and safetensors, which the machine has. Nothing is installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import commands

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / ".gpu"
MOST_BYTES = 64 * 2**20
# Of pyproject.toml, with all that they need; then what runs the tests.
IMPORTED = (
    *("annotated-types", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection"),
    *("annotated-doc", "jinja2", "markdown-it-py", "markupsafe", "mdurl", "psutil", "pygments", "pyyaml"),
    *("rich", "shellingham", "typer"),
)
TESTING = ("execnet", "hypothesis", "iniconfig", "packaging", "pluggy", "pytest", "pytest-xdist", "sortedcontainers")
PROVIDED = ("numpy", "safetensors", "torch", "triton")


def main(arguments: Sequence[str]) -> None:
    """Make the bundle anew."""
    commands.parser("benchmarks.device.bundle", __doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        _pip("download", "--only-binary=:all:", "--dest", folder, *IMPORTED, *TESTING)
        if Path(sysconfig.get_path("include"), "Python.h").exists():
            # Threads of C++: the machine's OpenMP may be another one than that of this compiler.
            _wheel(made, PYMERGE_OPENMP="0")
        else:
            print(f"{sys.executable} has no headers: no C++ and no CUDA C++ in this bundle; its machine may build them")
        _wheel(made, PYMERGE_NATIVE="0", PYMERGE_CUDA="0")
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > MOST_BYTES:
            raise SystemExit(f"the wheels have {size / 2**20:.0f} MiB, more than {MOST_BYTES / 2**20:.0f}")
        shutil.rmtree(BUNDLE, ignore_errors=True)
        shutil.copytree(made, BUNDLE)
    (BUNDLE / "commit").write_text(_commit() + "\n")
    names = sorted(file.name for file in BUNDLE.iterdir())
    print(f"{BUNDLE}: {size / 2**20:.1f} MiB\n" + "\n".join(names))


def _wheel(folder: Path, **variables: str) -> None:
    """Build pymerge's wheel with these environment variables."""
    _pip("wheel", "--wheel-dir", str(folder), str(ROOT), **variables)


def _pip(command: str, *words: str, **variables: str) -> None:
    constraints = str(ROOT / "constraints.txt")
    environment = {**os.environ, "PIP_CONSTRAINT": constraints, **variables}
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"pip {command} failed; this machine needs network, and pip in {sys.executable}")


def _commit() -> str:
    """The commit of this checkout, with "+changes" if files differ from it."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+changes" if found[1] else "")
