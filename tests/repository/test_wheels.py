"""The wheel of this machine is built out of the sdist, and runs where no compiler is (make wheel, wheel-test)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from wheels.build import pythons
from wheels.compiler import compile_one

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_wheel_is_built_and_runs_without_a_compiler(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
    requirements = ["-c", str(ROOT / "constraints.txt"), "-r", str(ROOT / "wheels/requirements.txt")]
    subprocess.run([str(tools / "bin/python"), "-m", "pip", "install", "--quiet", *requirements], check=True)
    dist = tmp_path / "dist"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    build = [str(tools / "bin/python"), "-m", "wheels.build", "--dist", str(dist), "--machines", os.uname().machine]
    subprocess.run(build, check=True, cwd=ROOT, env=plain)
    names = sorted(file.name for file in dist.iterdir())
    assert names[-1].endswith(".tar.gz")
    assert all("manylinux_2_" in name for name in names[:-1])
    subprocess.run([sys.executable, "-m", "wheels.tried", str(dist)], check=True, cwd=ROOT, env=plain)


@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="no headers of Python here")
def test_what_runs_of_pythons_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv has a script on PATH for each version it knows, which fails for those that are not chosen."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    not_chosen, own = tmp_path / "bin" / f"python{version}", tmp_path / f"versions/{version}.7/bin/python{version}"
    for script, text in ((not_chosen, "exit 127"), (own, f'exec {sys.executable} "$@"')):
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{not_chosen.parent}{os.pathsep}/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert str(own) in pythons()
    assert str(not_chosen) not in pythons()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_what_no_python_is_in_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_WHEEL_OBJECTS", str(tmp_path / "objects"))
    monkeypatch.chdir(tmp_path)

    def compiled(file: str, name: str, *flags: str) -> int:
        return compile_one("x86_64", [f"-I/include/{name}", *flags, "-c", file, "-o", f"{name}.o"])

    for folder in ("ops", "bindings"):
        source = Path("csrc", folder, "one.cpp")
        source.parent.mkdir(parents=True)
        source.write_text("int one() { return 1; }")
        assert compiled(str(source), "first") == 0
        source.write_text("what changes meanwhile is seen")
        assert (compiled(str(source), "second") == 0) == (folder == "ops")
        assert compiled(str(source), "third", "-O3") != 0, "other flags, other objects"
    assert Path("second.o").exists()
