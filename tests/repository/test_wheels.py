"""The wheel of this machine is built out of the sdist, and runs where no compiler is (make wheel, wheel-test)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
