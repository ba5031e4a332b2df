"""The weighted Gram matrix of all task vectors, straight from the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_length, check_matrix, check_task_tensors, compute_dtype, task_vector


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
    check_task_tensors("task_gram", base, experts, ndim=2)
    check_length("task_gram", "weights", weights, len(experts))
    if means is not None:
        check_matrix("task_gram", "means", means, (len(experts), base.shape[1]))
    if dtype not in (None, torch.float32, torch.float64):
        raise ArgumentError(f"task_gram: dtype {dtype} is not float32 or float64; Grams need at least float32")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return S = sum_t w_t tau~_t^T tau~_t, d_in x d_in, symmetric.

    Args:
        base: W_0, d_out x d_in, floating point.
        experts: T tensors W_t like it.
        weights: T numbers w_t; 0 leaves a task out.
        means: [T, d_in] column means to subtract (tau~_t = tau_t - 1 mu_t^T), or None for tau~_t = tau_t.
        dtype: float32 or float64, of products and result; default float32, float64 if an input is.

    Source: A of WUDI-Merging's normal equations (arXiv 2503.08099), covariance of ACE-Merging (arXiv 2603.02945).
    """
    dtype = dtype or compute_dtype(base, *experts)
    columns = base.shape[1]
    gram = torch.zeros(columns, columns, dtype=dtype, device=base.device)
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        if weight == 0.0:
            continue
        tau = task_vector(base, expert, None if means is None else means[index], dtype)
        gram.addmm_(tau.mT, tau, alpha=weight)
    return gram


OP = Op("task_gram", check, reference, "S = sum_t w_t tau_t^T tau_t, straight from the weights")
