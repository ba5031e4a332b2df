"""The kernels of routed_linear compile to cubins for every architecture without a driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pymerge.kernels._common import _SIZES
from pymerge.kernels.routed_linear import factored_kernel, mixed_kernel

STRIDES = {"M": "i32", "K": "i32", "row_stride": "i64", "column_stride": "i64", "task_stride": "i64"}
for arch, table in _SIZES.items():
    (s,) = table["routed_linear"]
    for kernel, rows, more in ((mixed_kernel, s.block, {"tiles": "*i32"}), (factored_kernel, 16, {"N": "i32"})):
        for kind in ("bf16", "fp16", "fp32"):
            signature = {"out": f"*{kind}", "x": f"*{kind}", "weight": f"*{kind}", "tasks": "*bf16", "gates": "*fp32",
                         "biases": f"*{kind}", **more, **STRIDES}
            constants = {"TASKS": 8, "HAS_BIAS": True, "UPCAST": False, "BLOCK_N": rows, "BLOCK_M": s.block,
                         "BLOCK_K": s.depth}
            source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
            options = {"num_warps": s.warps, "num_stages": s.stages}
            code = compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
            assert f".target sm_{arch}" in code["ptx"], code["ptx"][:500]
            print(kernel.__name__, kind, arch, len(code["cubin"]))
"""


def test_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert len(built) == 12
    assert {row[2] for row in built} == {"80", "90"}
    assert all(int(row[3]) > 1000 for row in built)
