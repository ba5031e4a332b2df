"""Singular value calibration: directions of a merged delta that tasks share, scaled back to what they ask for."""

from __future__ import annotations

import math
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
    has of what task t asks for, a_tr = u_r^T tau_t. Singular values that are rounding are left out. Of those that end
    above c, `most` times their root mean square, only the part is kept that tasks agree on: c + (s_r - c) max(g_r, 0)
    with g_r = (||sum_t a_tr||^2 - sum_t ||a_tr||^2) / ((T - 1) sum_t ||a_tr||^2), 1 where all ask for the same, 0 where
    what they ask for is orthogonal.

    Source: Singular Value Calibration, arXiv 2602.05536, algorithm 1; `most` and `rounding` are ours
    (docs/method-weir.md).
    """

    summary = "singular values of a merged delta calibrated by the tasks' projections (SVC)"

    delta: ArrayLike  # X, d_out x d_in, float32 or float64
    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    alpha: float = 1.0  # above 0: with 1 directions can only shrink, with 1 / T they can grow up to T times
    most: float = math.inf  # at least 1; finite only with two tasks or more
    # A response of a task of at most this share of ||tau_t||_F is none: s_tr is 0, and counts as alpha. With None as
    # released: ||a_tr||^2 counts as at least 1e-12, so that gamma is not the same for deltas of another size.
    rounding: float | None = None

    def check(self) -> None:
        """Raise ArgumentError unless all matrices have one shape, and numbers are in their ranges."""
        check_task_tensors("calibrate", self.base, self.experts, ndim=2)
        check_matrix("calibrate", "delta", as_tensor(self.delta), (self.base.shape[0], self.base.shape[1]))
        if not self.alpha > 0:
            raise ArgumentError(f"calibrate: alpha is {self.alpha}; give a number above 0")
        if not self.most >= 1:
            raise ArgumentError(f"calibrate: most is {self.most}; give a number of at least 1")
        if len(self.experts) == 1 and self.most < math.inf:
            raise ArgumentError(f"calibrate: most is {self.most} for one task, which agrees with nobody; leave it out")
        if self.rounding is not None and not self.rounding >= 0:
            raise ArgumentError(f"calibrate: rounding is {self.rounding}; give a number of at least 0, or None")

    def reference(self) -> Tensor:
        """One decomposition, and a product for each task."""
        import torch

        X, base = as_tensor(self.delta), as_tensor(self.base)
        U, s, V = numerical_triplets(X, min(X.shape))
        total, energies = torch.zeros_like(s), torch.zeros_like(s)
        summed = torch.zeros_like(V.mT) if self.most < math.inf else None  # rank x d_in
        for expert in self.experts:
            tau = task_vector(base, as_tensor(expert), None, torch.float64)
            least = 0.0 if self.rounding is None else (self.rounding * float(tau.norm())) ** 2
            responses = U.mT @ tau
            along = s * (responses * V.mT).sum(dim=1)
            if summed is not None:
                summed += responses
            squares = responses.square_().sum(dim=1)
            energies += squares
            if self.rounding is None:
                squares.clamp_(min=_TINY)
            total += torch.where(squares > least, along / squares, 0.0).clamp(min=self.alpha)
        s = s * len(self.experts) / total
        if summed is not None and len(s) > 0:
            pairs = summed.square_().sum(dim=1) - energies
            agreed = torch.where(energies > 0, pairs / energies, 0.0) / (len(self.experts) - 1)
            crest = self.most * s.square().mean().sqrt()
            s = torch.where(s > crest, crest + (s - crest) * agreed.clamp(0, 1), s)
        calibrated: Tensor = (U * s) @ V.mT
        return calibrated.to(X.dtype)
