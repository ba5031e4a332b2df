"""Normal equations of the interference loss: the matrices that WUDI descends on and ACE solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, check_length, check_matrix, task_vector
from pymerge.ops.task_gram import check_task_matrices, product_dtype

if TYPE_CHECKING:
    from torch import Tensor


class System(NamedTuple):
    """X A = B is the stationarity condition of sum_t w_t ||(X - tau_t) tau~_t^T||_F^2."""

    A: Tensor  # d_in x d_in, symmetric positive semi-definite
    B: Tensor  # d_out x d_in; relative to `origin` when one was given


@dataclass(frozen=True, eq=False)
class NormalEquations(Op[System]):
    """A = sum_t (w_t G_t + e_t I) and B = sum_t (tau~_t - O) (w_t G_t + e_t I), with G_t = tau~_t^T tau~_t.

    Added in the order of the tasks.

    Source: gradient 2 (X A - B) of the loss of WUDI-Merging, arXiv 2503.08099; with ridges, numerator and denominator
    of ACE-Merging, arXiv 2603.02945.
    """

    summary = "A and B of the interference loss, one task at a time"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    weights: Sequence[float]  # T numbers w_t; with a ridge of 0, 0 leaves a task out
    means: Tensor | None = None  # [T, d_in] to subtract, tau~_t = tau_t - 1 mu_t^T; None: tau~_t = tau_t
    # O, d_out x d_in, or None for 0. With an origin, B = B_0 - O A, but formed from the small differences tau~_t - O
    # and not as the difference of two large products: exactly 0 where O = tau~_t.
    origin: Tensor | None = None
    dtype: str | None = None  # F32 or F64, of products and results; default: F32, F64 if an input is
    ridges: Sequence[float] | None = None  # T numbers e_t, or None for 0

    def check(self) -> None:
        """Raise ArgumentError unless matrices, weights, means, origin and ridges agree."""
        check_task_matrices("normal_equations", self.base, self.experts, self.weights, self.means, self.dtype)
        if self.ridges is not None:
            check_length("normal_equations", "ridges", self.ridges, len(self.experts))
        if self.origin is not None:
            check_matrix("normal_equations", "origin", self.origin, (self.base.shape[0], self.base.shape[1]))

    def reference(self) -> System:
        """Two matrices d_out x d_in in memory at a time."""
        import torch

        base = as_tensor(self.base)
        dtype = product_dtype(self.dtype, base, self.experts)
        rows, columns = base.shape
        A = torch.zeros(columns, columns, dtype=dtype, device=base.device)
        B = torch.zeros(rows, columns, dtype=dtype, device=base.device)
        ridges = [0.0] * len(self.experts) if self.ridges is None else self.ridges
        for index, (expert, weight, ridge) in enumerate(zip(self.experts, self.weights, ridges, strict=True)):
            if weight == 0.0 and ridge == 0.0:
                continue
            mean = None if self.means is None else self.means[index]
            tau = task_vector(base, as_tensor(expert), mean, dtype)
            left = tau if self.origin is None else tau - self.origin.to(dtype)
            if outputs_first(rows, columns):
                A.addmm_(tau.mT, tau, alpha=weight)
                B.addmm_(left @ tau.mT, tau, alpha=weight)
            else:
                gram = tau.mT @ tau
                A.add_(gram, alpha=weight)
                B.addmm_(left, gram, alpha=weight)
            if ridge != 0.0:
                B.add_(left, alpha=ridge)
        A.diagonal().add_(sum(ridges))
        return System(A, B)


def outputs_first(rows: int, columns: int) -> bool:
    """True if (L tau^T) tau costs less than L (tau^T tau), whose Gram is needed for A anyway.

    2 d_out^2 d_in more for the first product against a Gram that A shares: worth it when d_in > 2 d_out.
    """
    return columns > 2 * rows
