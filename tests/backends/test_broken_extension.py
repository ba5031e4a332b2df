"""An extension that cannot load: the other one does, and what cannot says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pymerge
from pymerge import _C
from tests.helpers.checkpoints import llama, write_models

ROOT = Path(__file__).resolve().parents[2]
DESCRIBE = "import json; from pymerge.backends.runner import describe; print(json.dumps(describe()))"
MERGE = """
import sys, torch, pymerge
folder = sys.argv[1]
config = {"merge_method": "linear", "models": [{"model": f"{folder}/e0"}, {"model": f"{folder}/e1"}],
          "parameters": {"weight": 1}}
print(pymerge.__file__)
pymerge.merge(config, f"{folder}/out", progress=False)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with pymerge in it, without its extensions."""
    left = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(Path(pymerge.__file__).parent, tmp_path / "here/pymerge", ignore=left)
    shutil.copytree(ROOT / "kernels", tmp_path / "here/pymerge/kernels", ignore=left)
    return tmp_path / "here"


def run(package: Path, code: str, *arguments: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables, cwd=package).stdout


def test_a_broken_cuda_leaves_cpp_alone(package: Path) -> None:
    shutil.copy(_C.__file__, package / "pymerge")
    (package / "pymerge" / Path(_C.__file__).name.replace("_C", "_cuda")).write_bytes(b"\x7fELF, cut short")
    found = {name: (works, why) for name, works, why in json.loads(run(package, DESCRIBE))}
    assert found["native"][0]
    assert "combine" in found["native"][1]
    assert not found["cuda"][0]
    assert "pymerge._cuda does not load (" in found["cuda"][1]
    assert "pip install" in found["cuda"][1]


def test_a_broken_cpp_leaves_the_reference(package: Path, tmp_path: Path) -> None:
    (package / "pymerge" / Path(_C.__file__).name).write_bytes(b"\x7fELF, cut short")
    found = {name: (works, why) for name, works, why in json.loads(run(package, DESCRIBE))}
    assert found["reference"][0]
    assert not found["native"][0]
    assert "pymerge._C does not load (" in found["native"][1]
    models = write_models(tmp_path / "models", llama())
    assert str(package) in run(package, MERGE, str(models))
    assert (models / "out/model.safetensors").exists()
