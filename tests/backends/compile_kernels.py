"""Compiles every Triton kernel for one architecture and prints a line of JSON for each; no driver, no interpreter.

python tests/backends/compile_kernels.py 90
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module

from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge import kernels
from pymerge.kernels._common import SIZES, Variant

# What a launch finds out about its arguments where layers are as wide as real ones: addresses and widths are multiples
# of 16, on which vector loads and their pipelining depend.
ALIGNED = ("out", "base", "weights", "columns")
ALIGNED += ("target", "source", "D", "m", "v", "A", "B", "unscale", "schedule", "expert", "bits", "count")


def variants(arch: int) -> Iterator[Variant]:
    """What the modules of the folder list."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.startswith("_"):
            yield from import_module(f"pymerge.kernels.{module.name}").variants(SIZES[arch])


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory of a thread: what did not fit into registers."""
    found = re.search(r"STACK:(\d+)", dumped(cubin, "-res-usage"))
    assert found is not None
    return int(found[1])


def main(arch: int) -> None:
    """Compile them all."""
    for variant in variants(arch):
        kernel, size = variant.kernel, variant.size
        signature = {argument: variant.types.get(argument, "constexpr") for argument in kernel.arg_names}
        aligned = {(place,): [["tt.divisibility", 16]] for place, n in enumerate(signature) if n in ALIGNED}
        source = ASTSource(kernel, signature, variant.constants, aligned)
        options = {"num_warps": size.warps, "num_stages": size.stages, "enable_fp_fusion": variant.contracts}
        built = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = built.asm["ptx"]
        about = {
            "name": variant.name,
            "target": re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0],
            "code": len(built.asm["cubin"]),
            "tensor": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\S*", ptx))),
            "copies": len(re.findall(r"cp\.async\.c[ag]\.shared\S* .*, 0x10,", ptx)),
            "all_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
            "contracts": variant.contracts,
            "fused": len(re.findall(r"\bfma\.rn(\.ftz)?\.f32\b", ptx)),
            "shared": built.metadata.shared,
            "stack": stack_bytes(built.asm["cubin"]),
            "machine": sorted(set(re.findall(r"\b[HQ]?G?MMA\.[0-9A-Zx.]+", dumped(built.asm["cubin"], "-sass")))),
        }
        print(json.dumps(about))


if __name__ == "__main__":
    main(int(sys.argv[1]))
