"""What is built without a GPU: no torch inside, CUDA and Triton code for every architecture."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pymerge import _C

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90")


def test_extension_has_no_torch_inside() -> None:
    """One build serves every torch version: it uses no symbol and no library of torch."""
    path = str(_C.__file__)
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert not re.findall(r"\S*(?:c10|torch|aten)\S*", symbols, re.IGNORECASE)
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert not [line for line in needed.splitlines() if "NEEDED" in line and ("torch" in line or "c10" in line)]


def test_only_the_bindings_include_pybind11_and_nothing_includes_torch() -> None:
    files = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 10
    for path in files:
        includes = re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in includes if name.startswith("pybind11")], path


def test_kernels_import_triton_and_torch_only() -> None:
    allowed = {"__future__", "collections", "typing", "torch", "triton"}
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert len(files) >= 4
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path


def test_top_level_kernels_stays_free() -> None:
    """`import kernels` belongs to Hugging Face's package; ours is pymerge.kernels."""
    code = "import importlib.util as u, pymerge.kernels; s = u.find_spec('kernels'); print(s and s.origin)"
    command = [sys.executable, "-I", "-c", code]  # isolated: the current folder is not on the path
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout


def test_build_info_names_language_and_threads() -> None:
    assert re.match(r"C\+\+20, compiler .*, (no )?OpenMP", _C.build_info())


def test_unknown_dtype_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown dtype code 9; 0 to 3 are known"):
        _C.combine(0, 9, 0, 0, [], [], [], 0, 1)
    with pytest.raises(ValueError, match="2 inputs, 1 dtypes, 2 weights"):
        _C.combine(0, 0, 0, 0, [0, 0], [0], [1.0, 1.0], 0, 1)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine")
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("ops/*_cuda.cu")))
def test_cuda_source_compiles(source: str, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    target = tmp_path / "object.o"
    command = [str(NVCC), "-std=c++20", "-O3", "--fmad=false", *codes, f"-I{CSRC}", "-Werror=all-warnings"]
    done = subprocess.run(
        [*command, "-c", str(CSRC / "ops" / source), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 10_000


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine, so pymerge._cuda is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU the launch works")
def test_cuda_module_imports_without_a_gpu_and_says_so() -> None:
    from pymerge import _cuda

    assert all(arch in _cuda.build_info() for arch in ARCHS)
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ \(cudaError\w+\)"):
        _cuda.combine(0, 0, 0, 0, [1], [0], [1.0], 5, 0)
    with pytest.raises(ValueError, match="200 inputs; one launch takes 128"):
        _cuda.combine(0, 0, 0, 0, [1] * 200, [0] * 200, [1.0] * 200, 5, 0)


COMPILE_TRITON = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pymerge.kernels._common import _SIZES
from pymerge.kernels.combine import combine_kernel
from pymerge.kernels.task_gram import task_gram_kernel

def build(kernel, signature, constants, warps, arch):
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    code = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}).asm
    assert f".target sm_{arch}" in code["ptx"], code["ptx"][:500]
    print(kernel.__name__, arch, len(code["cubin"]))

for arch, table in _SIZES.items():
    s = table["combine"]
    for bf16 in (False, True):
        constants = {"HAS_BASE": bf16, "TO_BF16": bf16, "BLOCK": s.block}
        signature = {"out": "*i16" if bf16 else "*fp16", "base": "*bf16", "weights": ("fp32",) * 3,
                     "tensors": ("*bf16", "*fp32", "*fp16"), "count": "i64"}
        build(combine_kernel, signature, constants, s.warps, arch)
    s = table["task_gram"]
    constants = {"CENTRED": True, "BLOCK": s.block, "DEPTH": s.depth}
    signature = {"out": "*fp32", "base": "*bf16", "experts": ("*bf16", "*fp32"), "weights": ("fp32",) * 2,
                 "strides": ("i64",) * 2, "means": "*fp32", "rows": "i32", "columns": "i32",
                 "base_stride": "i64"}
    build(task_gram_kernel, signature, constants, s.warps, arch)
"""


def test_triton_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    """To cubins for every architecture: no driver needed, but a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TRITON], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    expected = ["combine_kernel"] * 2 + ["task_gram_kernel"]
    assert [row[:2] for row in built] == [[kernel, arch] for arch in ARCHS for kernel in expected]
    assert all(int(row[2]) > 1000 for row in built)
