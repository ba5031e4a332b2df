"""Reinforced Agent Merging: the mean of the task vectors that touch an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._blocks import task_blocks
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless tensors and factors fit together and dtypes are floating point."""
    check_task_tensors("ram", base, experts)
    if factors is not None:
        check_length("ram", "factors", factors, len(experts))
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"ram: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W_0 + the mean of the active tau_t at each element; tau_t is active where |tau_t| > epsilon.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        epsilon: size up to which an element of tau_t counts as untouched.
        factors: T numbers; where tau_t alone is active it is multiplied by factors[t]. Default: by 1.
        out_dtype: dtype of the result; default: the base's.

    In float32 (float64 if an input is), in the order of `experts`, rounded once at the end. Source: arXiv 2601.13572.
    """
    dtype = compute_dtype(base, *experts)
    merged = torch.empty(base.numel(), dtype=out_dtype or base.dtype, device=base.device)
    for here, origin, taus in task_blocks(base, experts, dtype):
        active = ~(taus.abs() <= epsilon)  # a NaN is active, so that it is in the result
        count = active.sum(0)
        total = torch.zeros_like(origin)
        for index, tau in enumerate(taus):
            total.add_(torch.where(active[index], tau, 0.0))
        total.div_(count.clamp(min=1))
        for index, factor in enumerate(factors or ()):
            total = torch.where(active[index] & (count == 1), total * factor, total)
        merged[here] = origin.add_(total)
    return merged.view(base.shape)


OP = FunctionOp("ram", check, reference, "mean of the task vectors that touch an element")
