"""Per-task numbers that decide weights: squared norms, column means, centred traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype, task_vector


class TaskStats(NamedTuple):
    """Statistics of T task vectors tau_t = W_t - W_0 (d_out x d_in)."""

    norms: Tensor  # [T] float64: n_t = ||tau_t||_F^2
    traces: Tensor  # [T] float64: p_t = ||tau_t - 1 mu_t^T||_F^2, the trace of the centred Gram
    means: Tensor  # [T, d_in], compute dtype: mu_t, the mean over rows


def check(base: Tensor, experts: Sequence[Tensor]) -> None:
    """Raise ArgumentError unless base and experts are matrices of one shape and device."""
    check_task_tensors("task_stats", base, experts, ndim=2)


def reference(base: Tensor, experts: Sequence[Tensor]) -> TaskStats:
    """Return n_t, p_t and mu_t of every task vector.

    Args:
        base: W_0, d_out x d_in, floating point.
        experts: T tensors W_t like it.

    Sums run in float64: n_t of a large layer adds 10^8 squares, and decides weights of everything after it. Separate
    from `task_gram` because its weights (1/n_t, 1/p_t) must be known before the sum over tasks starts.
    """
    dtype = compute_dtype(base, *experts)
    rows, columns = base.shape
    norms = torch.zeros(len(experts), dtype=torch.float64, device=base.device)
    traces = torch.zeros_like(norms)
    means = torch.zeros(len(experts), columns, dtype=dtype, device=base.device)
    for index, expert in enumerate(experts):
        tau = task_vector(base, expert, None, dtype).to(torch.float64)
        norms[index] = tau.square().sum()
        if rows > 0:
            mean = tau.mean(dim=0)
            means[index] = mean.to(dtype)
            traces[index] = (tau - mean).square_().sum()
    return TaskStats(norms, traces, means)


OP = FunctionOp("task_stats", check, reference, "squared norms, centred traces and column means of the task vectors")
