"""nearswap: q W_1 + (1 - q) W_0 with q = min(t / max(|W_1 - W_0|, least), 1), in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Table, Variant, as_bits, results, sizes, store_rounded


@triton.jit
def nearswap_kernel(out, base, expert, limit, least, count, TO_BF16: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    near = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    far = tl.load(expert + offsets, mask=mask, other=0.0).to(tl.float32)
    distance = tl.abs(far - near)
    distance = tl.where(distance < least, least, distance)  # NaN stays
    share = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), distance) * limit
    share = tl.where(share > 1.0, 1.0, share)
    store_rounded(out, offsets, share * far + (1.0 - share) * near, mask, TO_BF16)


def launch(out: Tensor, base: Tensor, expert: Tensor, t: float, least: float) -> None:
    """Write the result to `out`. All contiguous, of one element count; float32, float16 or bfloat16.

    Without contraction: the arithmetic of the other backends, bit for bit.
    """
    count = out.numel()
    if count == 0:
        return
    size = sizes("elementwise", out.device, lambda block: triton.cdiv(count, block))
    nearswap_kernel[(triton.cdiv(count, size.block),)](
        as_bits(out),
        base,
        expert,
        float(t),
        float(least),
        count,
        TO_BF16=out.dtype == torch.bfloat16,
        BLOCK=size.block,
        num_warps=size.warps,
        enable_fp_fusion=False,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, results of both kinds."""
    (size,) = table["elementwise"]
    for name, out, to_bf16 in results():
        types = {"out": out, "base": "*bf16", "expert": "*fp16", "limit": "fp32", "least": "fp32", "count": "i64"}
        constants = {"TO_BF16": to_bf16, "BLOCK": size.block}
        yield Variant(f"nearswap {name}", nearswap_kernel, types, constants, size, contracts=False)
