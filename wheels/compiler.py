"""Compiler and linker of the wheels, as setuptools calls them: python compiler.py x86_64|aarch64 ARGUMENTS.

On x86-64 GCC compiles: it alone makes the forms for AVX2 and AVX-512, of which the fastest is chosen at run time. Zig
has the C library of any release, so it links, against glibc 2.28; GCC's C++ library is put inside. For aarch64 Zig does
both. Nothing but PyInit_* is visible from outside, so that no other C++ library in the process is mixed with ours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GLIBC = "2.28"
_ZIG = (sys.executable, "-m", "ziglang")
_VISIBLE = "{ global: PyInit_*; local: *; };\n"
# A variable that glibc has since 2.32. Headers of newer ones read it; 0 says that there may be several threads.
_NEWER_GLIBC = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def compile_one(machine: str, arguments: list[str]) -> int:
    """Compile a file; one that an earlier wheel has compiled, for any Python, is taken from there."""
    kept, out = _kept(machine, arguments), arguments[arguments.index("-o") + 1] if "-o" in arguments else ""
    if kept is not None and kept.exists():
        shutil.copy(kept, out)
        return 0
    gcc = [os.environ.get("PYMERGE_GXX", "g++")]
    compiler = gcc if machine == "x86_64" else [*_ZIG, "c++", "-target", _target(machine)]
    code = subprocess.run([*compiler, *arguments], check=False).returncode
    if kept is not None and code == 0:
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(out, kept)
    return code


def _kept(machine: str, arguments: list[str]) -> Path | None:
    """Place of an object file that does not depend on the Python, as all of csrc but bindings, among those of a run."""
    folder, sources = os.environ.get("PYMERGE_WHEEL_OBJECTS"), [each for each in arguments if each.endswith(".cpp")]
    if folder is None or len(sources) != 1 or "-o" not in arguments or not sources[0].startswith("csrc/"):
        return None
    if sources[0].startswith("csrc/bindings/"):
        return None
    out = arguments.index("-o") + 1
    flags = [each for number, each in enumerate(arguments) if number != out and not each.startswith("-I/")]
    return Path(folder, f"{hashlib.sha256(repr((machine, flags)).encode()).hexdigest()}.o")


def link(machine: str, arguments: list[str]) -> int:
    """Link a shared library from the object files among the arguments."""
    objects = [argument for argument in arguments if argument.endswith(".o")]
    out = arguments[arguments.index("-o") + 1]
    with tempfile.TemporaryDirectory() as folder:
        visible, newer = Path(folder, "visible.map"), Path(folder, "newer_glibc.c")
        visible.write_text(_VISIBLE)
        newer.write_text(_NEWER_GLIBC)
        command = ["-target", _target(machine), "-shared", "-s", "-o", out, *objects, f"-Wl,--version-script={visible}"]
        if machine == "x86_64":
            libraries = [_of_gcc(name) for name in ("libstdc++.a", "libgcc_eh.a", "libgcc.a")]
            command = ["cc", *command, str(newer), *libraries]
        else:
            command = ["c++", *command]
        return subprocess.run([*_ZIG, *command, "-lpthread", "-ldl", "-lm"], check=False).returncode


def _target(machine: str) -> str:
    return f"{machine}-linux-gnu.{GLIBC}"


def _of_gcc(name: str) -> str:
    """Path of one of GCC's own libraries."""
    command = [os.environ.get("PYMERGE_GXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    machine, *arguments = sys.argv[1:]
    sys.exit((link if "-shared" in arguments else compile_one)(machine, arguments))
