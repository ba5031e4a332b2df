"""Per-task numbers that decide weights: squared norms, column means, centred traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, task_vector

if TYPE_CHECKING:
    from torch import Tensor


class Stats(NamedTuple):
    """Statistics of T task vectors tau_t = W_t - W_0 (d_out x d_in), as tensors on their device."""

    norms: Tensor  # [T] float64: n_t = ||tau_t||_F^2
    traces: Tensor  # [T] float64: p_t = ||tau_t - 1 mu_t^T||_F^2, the trace of the centred Gram
    means: Tensor  # [T, d_in], float32 (float64 if an input is): mu_t, the mean over rows; 0 of no rows


@dataclass(frozen=True, eq=False)
class TaskStats(Op[Stats]):
    """n_t, p_t and mu_t of every task vector.

    Sums run in float64: n_t of a large layer adds 10^8 squares, and decides weights of everything after it. Separate
    from `task_gram` because its weights (1/n_t, 1/p_t) must be known before the sum over tasks starts.
    """

    summary = "squared norms, centred traces and column means of the task vectors"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape and device."""
        check_task_tensors("task_stats", self.base, self.experts, ndim=2)

    def reference(self) -> Stats:
        """One task vector in memory at a time, in float64."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
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
        return Stats(norms, traces, means)
