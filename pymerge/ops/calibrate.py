"""Singular value calibration: directions of a merged delta that tasks share, scaled back to what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix, check_task_tensors, task_vector
from pymerge.ops._singular import numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor

# Of the released form: keeps the quotient finite where a task does not touch a direction.
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Calibrate(Op["Tensor"]):
    """X' = U diag(gamma s) V^T of X = U diag(s) V^T, d_out x d_in, in X's dtype; computed in float64.

    gamma_r = T / sum_t max(s_tr, alpha), with s_tr = <a_r, a_tr> / max(||a_tr||^2, 1e-12) the part that a_r = u_r^T X
    has of what task t asks for, a_tr = u_r^T tau_t. Singular values that are rounding are left out.

    Source: Singular Value Calibration, arXiv 2602.05536, algorithm 1.
    """

    summary = "singular values of a merged delta calibrated by the tasks' projections (SVC)"

    delta: ArrayLike  # X, d_out x d_in, float32 or float64
    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    alpha: float = 1.0  # above 0: with 1 directions can only shrink, with 1 / T they can grow up to T times

    def check(self) -> None:
        """Raise ArgumentError unless all matrices have one shape and alpha is above 0."""
        check_task_tensors("calibrate", self.base, self.experts, ndim=2)
        check_matrix("calibrate", "delta", as_tensor(self.delta), (self.base.shape[0], self.base.shape[1]))
        if not self.alpha > 0:
            raise ArgumentError(f"calibrate: alpha is {self.alpha}; give a number above 0")

    def reference(self) -> Tensor:
        """One decomposition, and a product for each task."""
        import torch

        X, base = as_tensor(self.delta), as_tensor(self.base)
        U, s, V = numerical_triplets(X, min(X.shape))
        total = torch.zeros_like(s)
        for expert in self.experts:
            responses = U.mT @ task_vector(base, as_tensor(expert), None, torch.float64)
            along = s * (responses * V.mT).sum(dim=1)
            total += (along / responses.square().sum(dim=1).clamp(min=_TINY)).clamp(min=self.alpha)
        calibrated: Tensor = (U * (s * len(self.experts) / total)) @ V.mT
        return calibrated.to(X.dtype)
