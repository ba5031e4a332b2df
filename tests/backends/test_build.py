"""Builds without a GPU: no torch inside, CUDA and Triton code for every architecture."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

from pymerge import _C
from pymerge.backends.runner import implemented

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90")


def test_extension_has_no_torch_inside() -> None:
    """One build serves every torch version: it uses no symbol and no library of torch."""
    path = str(_C.__file__)
    lines = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-1] for line in lines]  # not their addresses, which may be any digits
    assert "PyInit__C" in symbols
    assert not [symbol for symbol in symbols if re.search("c10|torch|aten", symbol, re.IGNORECASE)]
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert not [line for line in needed.splitlines() if "NEEDED" in line and ("torch" in line or "c10" in line)]


def test_only_the_bindings_include_pybind11_and_nothing_includes_torch() -> None:
    files = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 10
    for path in files:
        includes = re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)], path
        if path.parent.name != "bindings":
            assert not [name for name in includes if name.startswith("pybind11")], path


def test_kernels_import_triton_and_torch_only() -> None:
    allowed = {"__future__", "collections", "functools", "threading", "typing", "torch", "triton"}
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
    assert re.match(r"C\+\+20, compiler .*, (threads without )?OpenMP", _C.build_info())


def test_unknown_dtype_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown dtype code 9; 0 to 3 are known"):
        _C.combine((0, 9, 0), None, [], [], 1.0, 1)


def test_inputs_that_do_not_fit_each_other_are_an_error() -> None:
    """Addresses say nothing about sizes: a call with a wrong one would read or write elsewhere."""
    three, four, double = (64, 0, 3), (64, 0, 4), (64, 1, 4)  # nothing is read
    pair: Any = (0, 0)
    with pytest.raises(ValueError, match="combine: 2 tensors, 1 weights; give one of each"):
        _C.combine(four, None, [four, four], [1.0], 1.0, 1)
    with pytest.raises(ValueError, match="combine: the base has 3 elements, not 4"):
        _C.combine(four, three, [four], [1.0], 1.0, 1)
    with pytest.raises(ValueError, match="combine: tensor 1 has 3 elements, not 4"):
        _C.combine(four, None, [four, three], [1.0, 1.0], 1.0, 1)
    with pytest.raises(ValueError, match="magnitude_counts: expert 0 has 3 elements, not 4"):
        _C.magnitude_counts(0, four, [three], [0], 0, 0, False, 1)
    with pytest.raises(ValueError, match="random_mask: expert 0 has 4 elements, not 6"):
        _C.random_mask((0, 0, 0), None, [four], [0.5], [0.5], [0], 0, 2, 3, 1)
    with pytest.raises(ValueError, match="nearswap: 3 elements of output, 4 of input"):
        _C.nearswap(three, four, four, 1.0, 1.0, 1)
    with pytest.raises(ValueError, match="importance: the dtype code of the output is 0, not 1"):
        _C.importance(four, double, four, 0, 2, 2, 1)
    with pytest.raises(ValueError, match="wudi_adam_step: the dtype code of m is 1, not 0"):
        _C.wudi_adam_step(four, double, four, four, four, 0.9, 0.99, 1.0, 1.0, 1.0, 1e-8, 1)
    with pytest.raises(ValueError, match="task_sum: the output has row stride 3 for 4 columns, contiguous"):
        _C.task_sum(three, four, [four], [1.0], 0, 1, 4, 1)
    with pytest.raises(ValueError, match="mix_dense: the output has 4 elements, not 2 x 2 x 2"):
        _C.mix_dense(four, four, 0, (0, 0, 0, 0), 2, 2, 2, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.is_finite(pair)


# Loads that they live on: of four elements at a time.
LOADS = {"trim_threshold_cuda.cu": {"LDG.E.128", "LDG.E.64"}}


@pytest.mark.slow
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
    for arch in ARCHS:
        listing = dump("-sass", "-arch", f"sm_{arch}", target)
        assert set(re.findall(r"LDG[A-Z]*\.E\.[A-Z0-9.]+", listing)) >= LOADS[source]
    assert max(map(int, re.findall(r"STACK:(\d+)", dump("-res-usage", target)))) == 0  # nothing is spilled


def dump(*arguments: object) -> str:
    """What cuobjdump, which Triton brings along, prints."""
    command = [knobs.nvidia.cuobjdump.path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine, so pymerge._cuda is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU the launch works")
def test_cuda_module_imports_without_a_gpu_and_says_so() -> None:
    from pymerge import _cuda

    assert all(arch in _cuda.build_info() for arch in ARCHS)
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ \(cudaError\w+\)"):
        _cuda.trim_threshold(1, 1, 1, (1, 0, 5), [(1, 0, 5)], [2], 0)


# Bytes of a thread's local memory, by kernel: an epilogue's that works on five tiles at once, and a few.
STACK = {"wudi_adam 128": 1344}
STACK_ELSE = 128
# Ops made of products; the others wait on memory.
PRODUCTS_OF_KERNELS = {"wudi_adam", "routed_linear"}
# Without contraction, which would change results, and votes of exactly 0.
EXACT = {"sparse_combine", "nearswap", "ram"}
SHARED_MEMORY = {"80": 163 * 1024, "90": 227 * 1024}


@pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_triton_kernels_compile_ahead_of_time(arch: str, tmp_path: Path) -> None:
    """In every dtype: no driver needed, but a process without the interpreter.

    What the compiler made of them is read, since none of it changes a result: tensor cores of the type that was asked
    for and not multiply-adds, loads of 16 bytes that overlap with computing, tiles that stay in registers.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(ROOT / "tests" / "backends" / "compile_kernels.py"), arch]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    built = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name.split()[0] for name in built} == set(implemented("triton"))
    assert {name.split()[0] for name, row in built.items() if not row["contracts"]} >= EXACT
    assert "wudi_adam 128" in built
    for name, row in built.items():
        assert row["target"].rstrip("a") == f"sm_{arch}", row
        assert row["shared"] <= SHARED_MEMORY[arch], row
        assert row["stack"] <= STACK.get(name, STACK_ELSE), row
        assert row["code"] > 1000, row
        assert row["contracts"] or row["fused"] == 0, row
        op, _, kind = name.partition(" ")
        if op not in PRODUCTS_OF_KERNELS:
            continue
        if op == "routed_linear":
            assert bool(row["tensor"]) == (not kind.endswith("fp32")), row
            continue
        family = "wgmma.mma_async" if arch == "90" else "mma"
        assert row["tensor"], row
        assert all(i.startswith(f"{family}.sync") and ".f32.f16.f16" in i for i in row["tensor"]), row
        assert all(i.startswith("HGMMA.64x" if arch == "90" else "HMMA.16816.F32") for i in row["machine"]), row
        assert row["copies"] == row["all_copies"] > 0, row
