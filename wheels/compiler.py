"""Compiler and linker of the wheels, as setuptools calls them: python compiler.py x86_64|aarch64 ARGUMENTS.

On x86-64 GCC compiles: it alone makes the forms for AVX2 and AVX-512, of which the fastest is chosen at run time. Zig
has the C library of any release, so it links, against glibc 2.28; GCC's C++ library is put inside. For aarch64 Zig does
both. Nothing but PyInit_* is visible from outside, so that no other C++ library in the process is mixed with ours.
"""

from __future__ import annotations

import os
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
    """Compile a file."""
    if machine == "x86_64":
        return subprocess.run([os.environ.get("PYMERGE_GXX", "g++"), *arguments], check=False).returncode
    return subprocess.run([*_ZIG, "c++", "-target", _target(machine), *arguments], check=False).returncode


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
