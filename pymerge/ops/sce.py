"""The erase step of SCE: the weighted mean of the task vectors that have the majority's sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import check_bits
from pymerge.ops._blocks import sum_in_order, task_blocks
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    bits: Tensor | None = None,
    least: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless tensors, weights and mask fit together and dtypes are floating point."""
    check_task_tensors("sce", base, experts)
    check_length("sce", "weights", weights, len(experts))
    if bits is not None:
        check_bits("sce", bits, 1, base.numel())
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"sce: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    bits: Tensor | None = None,
    least: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W_0 + sum_t w_t keep_t tau_t / sum_t w_t keep_t.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        weights: T numbers w_t.
        bits: [1, 8 ceil(numel / 64)] uint8, see `pymerge.ops._bitmask`: elements where this is not set keep W_0;
            default: all are merged.
        least: lower limit of the divisor. Where no task is kept the base stays.
        out_dtype: dtype of the result; default: the base's.

    keep_t: tau_t is not 0 and has the sign of sum_t tau_t (plus for 0). In float32 (float64 if an input is), in the
    order of `experts`, rounded once at the end. Source: FuseChat-3.0, arXiv 2408.07990; mergekit.
    """
    dtype = compute_dtype(base, *experts)
    merged = torch.empty(base.numel(), dtype=out_dtype or base.dtype, device=base.device)
    for here, origin, taus in task_blocks(base, experts, dtype, None if bits is None else bits[0]):
        positive = sum_in_order(taus) >= 0.0
        total, divisor = torch.zeros_like(origin), torch.zeros_like(origin)
        for tau, weight in zip(taus, weights, strict=True):
            kept = torch.where(positive, tau > 0.0, tau < 0.0).to(dtype).mul_(weight)
            total.add_(tau * kept)  # NaN stays, whatever its weight
            divisor.add_(kept)
        divisor = divisor.clamp(min=least)
        merged[here] = origin + total / torch.where(divisor == 0.0, 1.0, divisor)
    return merged.view(base.shape)


OP = FunctionOp(
    "sce", check, reference, "weighted mean of the task vectors of the majority's sign, over selected elements"
)
