"""The CUDA sources on CPU threads: their indices, tiles and barriers, where no GPU can run them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from torch import Tensor

from pymerge.backends.native import DTYPE_CODES, matrix_argument
from pymerge.ops import OPS
from pymerge.testing.cases import task_case
from pymerge.testing.compare import assert_accurate, assert_same

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = [0.7, -0.3, 2.5]
MIX = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """pymerge._cuda built by the C++ compiler from the .cu files, with launches rewritten."""
    folder = tmp_path_factory.mktemp("emulated")
    sources = [ROOT / "csrc" / "bindings.cpp"]
    for path in sorted((ROOT / "csrc" / "ops").glob("*_cuda.cu")):
        text, launches = re.subn(
            r"([\w<>]+)<<<(.*?), 0, (.*?)>>>\((\w+)\);", r"emulate(\1, \2, \3, \4);", path.read_text()
        )
        assert launches > 0, path
        sources.append(folder / path.with_suffix(".cpp").name)
        sources[-1].write_text(text)
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    includes = [ROOT / "tests" / "emulation", ROOT / "csrc", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    target = folder / "_cuda.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    defines = ["-DPM_CUDA", '-DPM_CUDA_ARCHS="emulated"']
    command = [compiler, *flags, *defines, *[f"-I{path}" for path in includes], *map(str, sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gram(module: ModuleType, base: Tensor, experts: list[Tensor], means: Tensor | None) -> Tensor:
    rows, columns = base.shape
    out = torch.full((columns, columns), float("nan"))
    matrices = [matrix_argument(expert) for expert in experts]
    address = 0 if means is None else means.data_ptr()
    module.task_gram(out.data_ptr(), matrix_argument(base), matrices, WEIGHTS, address, rows, columns, 0)
    return out


# One tile; two tile rows; three, an odd number, which leaves half a grid row over; several groups of rows.
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (17, 65), (20, 130), (530, 10)])
@pytest.mark.parametrize("centred", [False, True])
def test_task_gram(emulated: ModuleType, shape: tuple[int, int], centred: bool) -> None:
    case = task_case(shape, MIX)
    means = OPS["task_stats"].reference(case.base, case.experts).means if centred else None
    wide = case.to(torch.float64)
    reference = OPS["task_gram"].reference
    actual = gram(emulated, case.base, case.experts, means)
    truth = reference(wide.base, wide.experts, WEIGHTS, means, torch.float64)
    assert_accurate("S", actual, reference(case.base, case.experts, WEIGHTS, means), truth)
    assert_same("symmetry", actual, actual.mT)


def test_task_gram_with_row_strides(emulated: ModuleType) -> None:
    case, packed = task_case((17, 65), MIX, layout="row slice"), task_case((17, 65), MIX)
    assert_same("S", gram(emulated, case.base, case.experts, None), gram(emulated, packed.base, packed.experts, None))


@pytest.mark.parametrize("size", [1, 255, 1000])
@pytest.mark.parametrize("out_dtype", list(DTYPE_CODES))
@pytest.mark.parametrize("base_dtype", [None, *DTYPE_CODES])
def test_combine(emulated: ModuleType, size: int, out_dtype: torch.dtype, base_dtype: torch.dtype | None) -> None:
    case = task_case((1, size), [base_dtype or torch.float32, *MIX[1:]])
    base = None if base_dtype is None else case.base
    out = torch.full((1, size), float("nan"), dtype=out_dtype)
    emulated.combine(
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        0 if base is None else base.data_ptr(),
        DTYPE_CODES[base_dtype or torch.float32],
        [expert.data_ptr() for expert in case.experts],
        [DTYPE_CODES[expert.dtype] for expert in case.experts],
        WEIGHTS,
        size,
        0,
    )
    assert_same("combine", out, OPS["combine"].reference(base, case.experts, WEIGHTS, out_dtype))
