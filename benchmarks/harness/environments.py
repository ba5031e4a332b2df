"""Python environments of their own for the peers, made once and kept outside the checkout.

They lie in $PYMERGE_BENCH_CACHE, or ~/.cache/pymerge-bench, one folder for each list of packages; removing a folder
makes the next run install it again. PyTorch comes first and stays pinned: a peer's own requirements cannot replace it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
FUSION_BENCH = ("fusion-bench==0.2.33",)
MERGEKIT = ("mergekit==0.1.5",)
PEFT = ("peft==0.21.2",)


def cache() -> Path:
    """The folder that environments and made checkpoints share."""
    return Path(os.environ.get("PYMERGE_BENCH_CACHE") or Path.home() / ".cache" / "pymerge-bench").expanduser()


def environment(packages: Sequence[str], *, checkout: bool = False) -> Path:
    """The bin folder of an environment with PyTorch, these packages and, if asked, this checkout (editable).

    It is made if it is not there: minutes, and a gigabyte. An installation that was broken off starts again.
    """
    what = [sys.version.split()[0], TORCH, *packages, *([str(ROOT)] if checkout else [])]
    key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
    folder = cache() / "environments" / f"{packages[0].replace('==', '-')}-{key}"
    done = folder / "installed.txt"
    if not done.exists():
        print(f"installing {', '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        _pip(folder, TORCH)
        _pip(folder, TORCH, *packages)
        if checkout:
            # The compiled parts are built as in any other environment, without a GPU's: these runs are the CPU's.
            _pip(folder, "setuptools>=77,<90", "wheel>=0.43,<1", "pybind11>=2.13,<4")
            _pip(folder, TORCH, "--no-build-isolation", "--editable", str(ROOT), build_cuda=False)
        frozen = subprocess.run([folder / "bin/python", "-m", "pip", "freeze"], capture_output=True, check=True)
        done.write_bytes(frozen.stdout)
    return folder / "bin"


def _pip(folder: Path, *arguments: str, build_cuda: bool = True) -> None:
    variables = os.environ if build_cuda else {**os.environ, "PYMERGE_CUDA": "0"}
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=variables, check=True)


def versions(binaries: Path) -> list[str]:
    """What is installed in an environment that `environment` made, as `pip freeze` lists it."""
    return (binaries.parent / "installed.txt").read_text().splitlines()
