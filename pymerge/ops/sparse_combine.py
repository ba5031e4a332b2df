"""Merging sparse task vectors: mask, weigh, elect signs, normalise, scale and add to the base, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import blocks, check_bits, unpack
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    *,
    bits: Tensor | None = None,
    factors: Sequence[float] | None = None,
    elect: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> None:
    """Raise ArgumentError unless tensors, weights, factors and masks agree, and `out_dtype` is floating point."""
    check_task_tensors("sparse_combine", base, experts)
    check_length("sparse_combine", "weights", weights, len(experts))
    if factors is not None:
        check_length("sparse_combine", "factors", factors, len(experts))
    if bits is not None:
        check_bits("sparse_combine", bits, len(experts), base.numel())
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"sparse_combine: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    *,
    bits: Tensor | None = None,
    factors: Sequence[float] | None = None,
    elect: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Return W_0 + scale * sum_t v_t, v_t = w_t f_t m_t tau_t, with or without an election of signs.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it; each may have its own dtype.
        weights: T numbers w_t.
        out_dtype: of the result; default: the base's.
        bits: masks m_t, as in TaskMasks; default: everything is kept.
        factors: T numbers f_t that rescale the task vectors and are no weight; default: 1.
        elect: for each element, sum only the v_t whose sign is that of sum_t v_t; the sign of 0 is plus.
        normalize: divide the sum of an element by the sum of the w_t that take part in it: with `elect` those that
            agree and are not 0, else all; by 1 where that is 0.
        scale: factor of the sum.

    What is masked or outvoted is multiplied by 0, so NaN and infinity stay in the result. Accumulates in float32
    (float64 if an input is) in the order of `experts`, and rounds once at the end. Source: TIES-Merging, arXiv
    2306.01708, with mergekit's weights in the election.
    """
    dtype = compute_dtype(base, *experts)
    factors = [1.0] * len(experts) if factors is None else factors
    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    flat, others, merged = base.reshape(-1), [expert.reshape(-1) for expert in experts], out.view(-1)
    for begin, end in blocks(base.numel()):
        origin = flat[begin:end].to(dtype)
        total, share = torch.zeros_like(origin), torch.zeros_like(origin)
        values = [other[begin:end].to(dtype) - origin for other in others]
        if bits is not None:
            values = [value * unpack(bits[t], begin, end) for t, value in enumerate(values)]
        values = [value * (w * f) for value, w, f in zip(values, weights, factors, strict=True)]
        if elect:
            vote = torch.zeros_like(origin)
            for value in values:
                vote += value
            agrees = [torch.where(vote >= 0, value > 0, value < 0) for value in values]
            values = [value * agree for value, agree in zip(values, agrees, strict=True)]
            for weight, agree in zip(weights, agrees, strict=True):
                share += weight * agree.to(dtype)
        else:
            share += sum(weights)
        for value in values:
            total += value
        if normalize:
            total /= torch.where(share == 0, 1.0, share)
        merged[begin:end] = (origin + total * scale).to(out.dtype)
    return out


OP = FunctionOp(
    "sparse_combine", check, reference, "masked task vectors, signs elected or not, added to the base in one pass"
)
