"""combine: W_0 + (sum_t w_t (W_t - W_0)) / divisor, or the same without W_0, in one pass over the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, as_bits, sizes, store_rounded


@triton.jit
def combine_kernel(
    out,
    base,
    tensors,  # tuple of T pointers, each of its own type
    weights,  # tuple of T float32
    divisor,
    count,
    HAS_BASE: tl.constexpr,
    TO_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    if HAS_BASE:
        origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        origin = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in tl.static_range(len(tensors)):
        value = tl.load(tensors[t] + offsets, mask=mask, other=0.0).to(tl.float32)
        total += (value - origin) * weights[t]
    total = origin + tl.div_rn(total, tl.zeros((BLOCK,), dtype=tl.float32) + divisor)
    store_rounded(out, offsets, total, mask, TO_BF16)


def launch(
    out: Tensor, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], divisor: float
) -> None:
    """Write the result to `out`. All contiguous, of one element count; float32, float16 or bfloat16."""
    count = out.numel()
    if count == 0:
        return
    size = sizes("elementwise", out.device, lambda block: triton.cdiv(count, block))
    combine_kernel[(triton.cdiv(count, size.block),)](
        as_bits(out),
        out if base is None else base,
        tuple(tensors),
        tuple(float(weight) for weight in weights),
        float(divisor),
        count,
        HAS_BASE=base is not None,
        TO_BF16=out.dtype == torch.bfloat16,
        BLOCK=size.block,
        num_warps=size.warps,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, with a base and without."""
    (size,) = table["elementwise"]
    for name, out, based in (("fp16", "*fp16", False), ("bf16", "*i16", True)):
        types = {"out": out, "base": "*bf16", "tensors": EXPERTS, "weights": ("fp32",) * 3, "divisor": "fp32"}
        constants = {"HAS_BASE": based, "TO_BF16": based, "BLOCK": size.block}
        yield Variant(f"combine {name}", combine_kernel, types | {"count": "i64"}, constants, size)
