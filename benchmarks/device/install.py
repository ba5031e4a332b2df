"""Installs what a bundle holds beside the Python that runs this, into a folder of its own; nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

_LOADS = "import pymerge._C as c, pymerge.config.merge_config; print('C++:', c.build_info())"
_LOADS_CUDA = "import pymerge._cuda as c; print('CUDA C++:', c.build_info())"
_COMMON = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile")


def install(root: Path, site: Path, seconds: float) -> tuple[str, str]:
    """Install the wheels of `root`/.gpu into `site`, and build the extensions there if those of the bundle don't load.

    Without wheels, the checkout is taken as it is. Returns how it failed, or "", and what is told.
    """
    began, told = time.monotonic(), []
    wheels = bundled(root)
    if wheels:
        fitting = [wheel for wheel in wheels if _fits(wheel.name)]
        # Of pymerge there is one with extensions, for one Python, and one without, for others.
        others = [wheel for wheel in fitting if not wheel.name.startswith("pymerge_engine-")]
        chosen = map(str, [*others, *sorted(set(fitting) - set(others))[:1]])
        done = _run([*_COMMON, "--no-cache-dir", "--target", str(site), *chosen], site.parent, site, seconds)
        told.append(done.stdout)
        if done.returncode:
            return "the wheels cannot be installed", "".join(told)
    else:
        told.append("no .gpu here: pymerge as it is in this checkout (make gpu-bundle, on a machine with network)\n")
        site = root
    for name, code in (("pymerge._C", _LOADS), ("pymerge._cuda", _LOADS_CUDA)):
        loaded = _run(["-c", code], site.parent, site, 30)
        told.append(loaded.stdout)
        left = seconds - (time.monotonic() - began)
        if loaded.returncode and name == "pymerge._C" and wheels and left > 30 and _headers():
            told.append("built here, without network:\n")
            build = [*_COMMON, "--no-build-isolation", "--upgrade", "--target", str(site), str(root)]
            told.append(_run(build, site.parent, site, left - 5).stdout)
            loaded = _run(["-c", code], site.parent, site, 30)
        if loaded.returncode:
            told.append(
                f"without {name}: its ops are computed by PyTorch or Triton, and its tests fail or are left out\n"
            )
    works = _run(["-c", "import pymerge; print('pymerge', pymerge.__version__)"], site.parent, site, 30)
    return ("" if works.returncode == 0 else "pymerge cannot be imported"), "".join([*told, works.stdout])


def bundled(root: Path) -> list[Path]:
    """The wheels of a bundle, if there is one."""
    return sorted((root / ".gpu").glob("*.whl"))


def _fits(name: str) -> bool:
    """Whether a wheel is for this Python, as its name says."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    python, abi = name.removesuffix(".whl").split("-")[-3:-1]
    return "py3" in python.split(".") or tag in python.split(".") or abi == "abi3"


def _headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def _run(words: list[str], cwd: Path, site: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, *words], {"PYTHONPATH": str(site), "PYMERGE_CUDA_ARCHS": "90"}
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"ended after {seconds:.0f} s\n")
