"""Weighted sum of task vectors, without the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops import task_gram
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import compute_dtype, task_vector


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
    task_gram.check(base, experts, weights, means, dtype)


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return sum_t w_t tau~_t, d_out x d_in, contiguous.

    Args:
        base: W_0, d_out x d_in, floating point.
        experts: T tensors W_t like it.
        weights: T numbers w_t.
        means: [T, d_in] column means to subtract (tau~_t = tau_t - 1 mu_t^T), or None for tau~_t = tau_t.
        dtype: float32 or float64, of the sum and the result; default float32, float64 if an input is.

    What `combine` gives, less W_0, whose size would cost a small sum its digits. Source: the start X_0 of WUDI-Merging
    (arXiv 2503.08099), the ridge terms of ACE-Merging (arXiv 2603.02945).
    """
    dtype = dtype or compute_dtype(base, *experts)
    total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        total.add_(task_vector(base, expert, None if means is None else means[index], dtype), alpha=weight)
    return total


OP = FunctionOp("task_sum", check, reference, "sum_t w_t tau_t, straight from the weights")
