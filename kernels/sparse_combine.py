"""sparse_combine: W_0 + scale sum_t v_t, v_t = s_t m_t (W_t - W_0), signs elected or not, in one pass.

Where signs are elected the experts' block is loaded twice, for the vote and for the sum: the second time it comes from
the first-level cache, and registers need not hold T values an element.

Launched without contraction: fused, a vote of exactly 0 would be a small number with a sign, and elect another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, as_bits, results, sizes, store_rounded, word_places, words_of


@triton.jit
def _value(expert, origin, offsets, mask, bits, word, words, size, MASKED: tl.constexpr):
    """s_t m_t (W_t - W_0); what is masked is multiplied by 0, so that NaN and infinity stay."""
    value = tl.load(expert + offsets, mask=mask, other=0.0).to(tl.float32) - origin
    if MASKED:
        flags = tl.load(bits + word, mask=word < words, other=0)
        value *= ((flags[:, None] >> tl.arange(0, 32)[None, :]) & 1).to(tl.float32)
    return value * size


@triton.jit
def sparse_combine_kernel(
    out,
    base,
    experts,  # tuple of T pointers, each of its own type
    bits,  # [T, words] int32
    factors,  # tuple of T float32: s_t
    weights,  # tuple of T float32: what NORMALIZE adds up
    all_weights,  # their sum
    scale,
    count,
    words,
    MASKED: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TO_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word, offsets = word_places(BLOCK)
    mask = offsets < count
    origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK // 32, 32), dtype=tl.float32)
    for t in tl.static_range(len(experts)):
        total += _value(experts[t], origin, offsets, mask, bits + t * words, word, words, factors[t], MASKED)
    share = tl.zeros((BLOCK // 32, 32), dtype=tl.float32) + all_weights
    if ELECT:
        vote = total
        total = tl.zeros((BLOCK // 32, 32), dtype=tl.float32)
        share = tl.zeros((BLOCK // 32, 32), dtype=tl.float32)
        for t in tl.static_range(len(experts)):
            value = _value(experts[t], origin, offsets, mask, bits + t * words, word, words, factors[t], MASKED)
            agrees = tl.where(vote >= 0.0, value > 0.0, value < 0.0).to(tl.float32)
            total += value * agrees
            share += agrees * weights[t]
    if NORMALIZE:
        total = tl.div_rn(total, tl.where(share == 0.0, 1.0, share))
    store_rounded(out, offsets, origin + total * scale, mask, TO_BF16)


def launch(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    bits: Tensor | None,
    factors: Sequence[float],
    weights: Sequence[float],
    scale: float,
    elect: bool,
    normalize: bool,
) -> None:
    """Write the result to `out`. All contiguous, of one element count; float32, float16 or bfloat16.

    bits are [T, 8 ceil(count / 64)] uint8, or None; factors are s_t, weights what `normalize` adds up.
    """
    count = out.numel()
    if count == 0:
        return
    size = sizes("elementwise", out.device, lambda block: triton.cdiv(count, block))
    masks = None if bits is None else words_of(bits)
    sparse_combine_kernel[(triton.cdiv(count, size.block),)](
        as_bits(out),
        base,
        tuple(experts),
        base if masks is None else masks,
        tuple(float(factor) for factor in factors),
        tuple(float(weight) for weight in weights),
        float(sum(weights)),
        float(scale),
        count,
        0 if masks is None else masks.shape[1],
        MASKED=masks is not None,
        ELECT=elect,
        NORMALIZE=normalize,
        TO_BF16=out.dtype == torch.bfloat16,
        BLOCK=size.block,
        num_warps=size.warps,
        enable_fp_fusion=False,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, results of both kinds."""
    (size,) = table["elementwise"]
    for name, out, to_bf16 in results():
        types = {"out": out, "base": "*bf16", "experts": EXPERTS, "count": "i64", "bits": "*i32", "words": "i64"}
        types |= dict.fromkeys(("factors", "weights"), ("fp32",) * 3) | dict.fromkeys(("all_weights", "scale"), "fp32")
        constants = dict.fromkeys(("MASKED", "ELECT", "NORMALIZE", "TO_BF16"), to_bf16) | {"BLOCK": size.block}
        yield Variant(f"sparse_combine {name}", sparse_combine_kernel, types, constants, size, contracts=False)
