"""Compiles every Triton kernel for one architecture and prints a line of JSON for each; no driver, no interpreter.

python tests/backends/compile_kernels.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge.kernels._common import _SIZES, Sizes
from pymerge.kernels.combine import combine_kernel
from pymerge.kernels.combine_vectors import combine_vectors_kernel
from pymerge.kernels.magnitude_mask import magnitude_mask_kernel
from pymerge.kernels.nearswap import nearswap_kernel
from pymerge.kernels.ram import ram_counts_kernel, ram_kernel
from pymerge.kernels.random_mask import random_mask_kernel
from pymerge.kernels.sparse_combine import sparse_combine_kernel
from pymerge.kernels.spd_solve import ROWS, spd_solve_kernel, warps
from pymerge.kernels.task_dots import GROUP, task_dots_kernel
from pymerge.kernels.task_gram import task_gram_kernel
from pymerge.kernels.wudi_adam import wudi_adam_kernel

# What a launch finds out about its arguments where layers are as wide as real ones: addresses and widths are multiples
# of 16, on which vector loads and their pipelining depend.
ALIGNED = ("out", "base", "weights", "means", "columns", "base_layer", "base_stride", "expert_layer", "expert_stride")
ALIGNED += ("target", "source", "m", "v", "A", "B", "schedule", "expert", "bits", "count")

# name -> base, element type of the experts, DOT, CENTRED
GRAMS = {
    "bf16": ("*bf16", tl.bfloat16, "split", False),
    "fp16": ("*fp16", tl.float16, "split", False),
    "fp32": ("*fp32", tl.float32, "tf32", False),
    "fp32 centred": ("*fp32", tl.float32, "tf32", True),
    "bf16 centred": ("*bf16", tl.bfloat16, "tf32", True),
    "fp16 centred": ("*fp16", tl.float16, "tf32", True),
    "fp32 base, bf16": ("*fp32", tl.bfloat16, "tf32", False),
    "bf16 base, fp32": ("*bf16", tl.float32, "tf32", False),
}

# Launched without contraction: their arithmetic is that of the other backends, bit for bit.
EXACT = ("sparse_combine", "nearswap", "ram")

Variants = Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], Sizes]]


def elementwise(table: dict[str, tuple[Sizes, ...]]) -> Variants:
    """The ops that wait on memory: experts of all dtypes, results of both kinds."""
    experts, numbers = ("*bf16", "*fp32", "*fp16"), ("fp32",) * 3
    (size,) = table["elementwise"]
    tasks = {"base": "*bf16", "experts": experts, "count": "i64"}
    for bf16 in (False, True):
        out = {"out": "*i16" if bf16 else "*fp32"}
        kind, rounding = "bf16" if bf16 else "fp32", {"TO_BF16": bf16, "BLOCK": size.block}
        types = tasks | out | {"bits": "*i32", "words": "i64", "factors": numbers, "weights": numbers}
        types |= dict.fromkeys(("all_weights", "scale"), "fp32")
        options = {"MASKED": bf16, "ELECT": bf16, "NORMALIZE": bf16}
        yield f"sparse_combine {kind}", sparse_combine_kernel, types, options | rounding, size
        types = out | {"base": "*bf16", "tensors": experts, "weights": "*fp32", "rows": "i32", "columns": "i32"}
        options = {"HAS_BASE": bf16, "BY_COLUMNS": bf16, "TO_BF16": bf16, "ROWS": 4, "COLUMNS": size.block // 4}
        yield f"combine_vectors {kind}", combine_vectors_kernel, types, options, size
        types = out | {"base": "*bf16", "expert": "*fp16", "limit": "fp32", "least": "fp32", "count": "i64"}
        yield f"nearswap {kind}", nearswap_kernel, types, rounding, size
        yield f"ram {kind}", ram_kernel, tasks | out | {"factors": numbers, "epsilon": "fp32"}, rounding, size
    types = tasks | {"counts": "*i32", "epsilon": "fp32"}
    yield "ram_counts", ram_counts_kernel, types, {"BLOCK": size.block}, size
    for size in table["mask"]:
        types = tasks | {"bits": "*i32", "norms": "*fp64", "words": "i64"}
        thresholds = dict.fromkeys(("kept_keys", "kept_ends", "dropped_keys", "dropped_ends"), "*i64")
        options = {"DROPS": True, "BLOCK": size.block}
        yield f"magnitude_mask {size.block}", magnitude_mask_kernel, types | thresholds, options, size
        types |= {"keys": "*i64", "limits": "*i64", "start": "i64"}
        yield f"random_mask {size.block}", random_mask_kernel, types, {"BLOCK": size.block}, size
    size = table["task_dots"][0]
    for same in (True, False):
        types = dict.fromkeys(("first_left", "first_right", "tasks", "length", "parts"), "i32")
        types |= {"sums": "*fp64", "base": "*bf16", "left": ("*bf16",) * GROUP, "right": ("*bf16",) * GROUP}
        options = {"HAS_BASE": True, "SAME": same, "PART": size.block, "BLOCK": size.depth}
        yield f"task_dots {'triangle' if same else 'square'}", task_dots_kernel, types, options, size


def variants(arch: int) -> Variants:
    """(name, kernel, types of its arguments, constants, sizes). All dtypes, and all sizes of the most used ones."""
    table = _SIZES[arch]
    yield from elementwise(table)
    for bf16 in (False, True):
        types = {
            "out": "*i16" if bf16 else "*fp16",
            "base": "*bf16",
            "weights": ("fp32",) * 3,
            "divisor": "fp32",
            "count": "i64",
        }
        types |= {"tensors": ("*bf16", "*fp32", "*fp16")}
        constants = {"HAS_BASE": bf16, "TO_BF16": bf16, "BLOCK": table["elementwise"][0].block}
        yield f"combine {'bf16' if bf16 else 'fp16'}", combine_kernel, types, constants, table["elementwise"][0]
    for name, (base, element, dot, centred) in GRAMS.items():
        sizes = table[f"task_gram {dot}"]
        for size in sizes if name in ("bf16", "fp32") else sizes[-1:]:
            types = dict.fromkeys(("tasks", "rows", "columns"), "i32") | {"out": "*fp32", "base": base}
            types |= dict.fromkeys(("base_layer", "base_stride", "expert_layer", "expert_stride"), "i64")
            types |= {"experts": "*i64", "weights": "*fp32", "means": "*fp32"}
            constants = {"EXPERT": element, "DOT": dot, "CENTRED": centred, "ALIGNED": True, "INTERPRETED": False}
            constants |= {"BLOCK": size.block, "DEPTH": size.depth, "GROUP": size.group}
            yield f"task_gram {name} {size.block}", task_gram_kernel, types, constants, size
    for size in table["wudi_adam"]:
        types = dict.fromkeys(("target", "source", "m", "v", "A", "B", "schedule"), "*fp32") | {"numbers": "*i64"}
        types |= dict.fromkeys(("layers", "rows", "columns"), "i32")
        types |= dict.fromkeys(("take1", "keep2", "take2", "eps"), "fp32")
        constants = {"TURN": 0, "BLOCK": size.block, "DEPTH": size.depth, "GROUP": size.group}
        yield f"wudi_adam {size.block}", wudi_adam_kernel, types, constants, size
    for element, columns in (("fp32", 64), ("fp64", 16)):
        types = dict.fromkeys(("X", "S", "R", "prior", "start"), f"*{element}") | {"rows": "i32", "columns": "i32"}
        types |= {"conditions": "*fp64", "minors": "*i32"}
        constants = {"HAS_PRIOR": True, "ITERATIONS": 8, "BLOCK": columns, "ROWS": ROWS}
        yield f"spd_solve {element} {columns}", spd_solve_kernel, types, constants, Sizes(columns, warps=warps(columns))


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory of a thread: what did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        found = re.search(r"STACK:(\d+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found is not None
    return int(found[1])


def main(arch: int) -> None:
    """Compile them all."""
    for name, kernel, types, constants, size in variants(arch):
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        aligned = {(place,): [["tt.divisibility", 16]] for place, n in enumerate(signature) if n in ALIGNED}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": size.warps, "num_stages": size.stages}
        options["enable_fp_fusion"] = name.split()[0] not in EXACT
        built = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = built.asm["ptx"]
        about = {
            "name": name,
            "target": re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0],
            "tensor": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\S*", ptx))),
            "copies": len(re.findall(r"cp\.async\.c[ag]\.shared\S* .*, 0x10,", ptx)),
            "all_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
            "fused": len(re.findall(r"\bfma\.rn(\.ftz)?\.f32\b", ptx)),
            "shared": built.metadata.shared,
            "stack": stack_bytes(built.asm["cubin"]),
        }
        print(json.dumps(about))


if __name__ == "__main__":
    main(int(sys.argv[1]))
