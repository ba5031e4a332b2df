"""Environment variables, each parsed in one place, and the report of `pymerge env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache

VARIABLES = {
    "PYMERGE_BACKEND": "backend when none is named on the command line: auto, reference, native, triton, cuda",
    "PYMERGE_CUDA": "at build time: auto (build the CUDA extension where nvcc is found), 0 (don't), 1 (must)",
    "PYMERGE_CUDA_ARCHS": "at build time: CUDA architectures, default 80;90",
}

_PACKAGES = ("torch", "triton", "safetensors", "numpy", "pydantic", "transformers", "gguf")


def default_backend() -> str:
    """PYMERGE_BACKEND, or "auto"."""
    return os.environ.get("PYMERGE_BACKEND") or "auto"


def threads() -> int:
    """OMP_NUM_THREADS, as far as it is a number, or the processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return usable_cpus()


def usable_cpus() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hold_products() -> None:
    """Have PyTorch's products give the same bits for any number of threads, on Intel's processors.

    There MKL cuts long sums by the number of threads unless it is told not to, before its first product of a process:
    so this is called when pymerge is imported. An MKL_CBWR that is set stays. On other processors sums are not cut, and
    the setting would take the slowest instructions.
    """
    try:
        with open("/proc/cpuinfo", "rb") as file:
            intels = b"GenuineIntel" in file.read(256)
    except OSError:
        return
    if intels:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@cache
def _installed(package: str) -> str:
    """The version of a distribution: its metadata are parsed, which takes a millisecond."""
    return importlib.metadata.version(package)


def version() -> str:
    """The version of the installed distribution."""
    return _installed("pymerge-engine")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results and speed; "not installed" where one is missing."""
    found = {"pymerge-engine": version()}
    for name in _PACKAGES:
        try:
            found[name] = _installed(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_line() -> str:
    """Python, operating system and processor, for reports and result files."""
    return f"Python {sys.version.split()[0]}, {platform.system()} {platform.release()}, {platform.machine()}"
