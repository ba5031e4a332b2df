"""The CUDA sources built for a CPU: their indices, tiles, barriers and rounding, where no GPU can run them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """pymerge._cuda built by the C++ compiler from the .cu files, with launches rewritten."""
    folder = tmp_path_factory.mktemp("emulated")
    sources = [ROOT / "csrc" / "bindings" / "cuda.cpp"]
    for path in sorted((ROOT / "csrc" / "ops").glob("*_cuda.cu")):
        text, launches = re.subn(
            r"([\w<>:, ]+)<<<(.*?), 0, (.*?)>>>\((\w+)\);", r"emulate(\1, \2, \3, \4);", path.read_text()
        )
        assert launches > 0, path
        sources.append(folder / path.with_suffix(".cpp").name)
        sources[-1].write_text(text)
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    includes = [ROOT / "tests" / "backends" / "emulation", ROOT / "csrc", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-U_FORTIFY_SOURCE"]
    defines = ['-DPM_CUDA_ARCHS="emulated"']
    command = [compiler, *flags, *defines, *[f"-I{path}" for path in includes]]

    def build(*arguments: object) -> None:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    objects = [folder / source.with_suffix(".o").name for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, made: build("-c", source, "-o", made), sources, objects))
    target = folder / "_cuda.so"
    build("-shared", *objects, "-o", target)
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
