"""Compiles every Triton kernel for one architecture and prints a line of JSON for each; no driver, no interpreter.

python tests/compile_kernels.py 90
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
from pymerge.kernels._common import _SIZES, Sizes
from pymerge.kernels.combine import combine_kernel
from pymerge.kernels.spd_solve import ROWS, spd_solve_kernel, warps
from pymerge.kernels.task_gram import task_gram_kernel
from pymerge.kernels.wudi_adam import wudi_adam_kernel
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What a launch finds out about its arguments where layers are as wide as real ones: addresses and widths are multiples
# of 16, on which vector loads and their pipelining depend.
ALIGNED = ("out", "base", "weights", "means", "columns", "base_layer", "base_stride", "expert_layer", "expert_stride")
ALIGNED += ("target", "source", "m", "v", "A", "B", "schedule")

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


def variants(arch: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], Sizes]]:
    """(name, kernel, types of its arguments, constants, sizes). All dtypes, and all sizes of the most used ones."""
    table = _SIZES[arch]
    for bf16 in (False, True):
        types = {
            "out": "*i16" if bf16 else "*fp16",
            "base": "*bf16",
            "weights": ("fp32",) * 3,
            "divisor": "fp32",
            "count": "i64",
        }
        types |= {"tensors": ("*bf16", "*fp32", "*fp16")}
        constants = {"HAS_BASE": bf16, "TO_BF16": bf16, "BLOCK": table["combine"][0].block}
        yield f"combine {'bf16' if bf16 else 'fp16'}", combine_kernel, types, constants, table["combine"][0]
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
        built = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = built.asm["ptx"]
        about = {
            "name": name,
            "target": re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0],
            "tensor": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\S*", ptx))),
            "copies": len(re.findall(r"cp\.async\.c[ag]\.shared\S* .*, 0x10,", ptx)),
            "all_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
            "shared": built.metadata.shared,
            "stack": stack_bytes(built.asm["cubin"]),
        }
        print(json.dumps(about))


if __name__ == "__main__":
    main(int(sys.argv[1]))
