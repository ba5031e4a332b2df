"""Subspace boosting: small singular values of a merged delta raised to where its leading ones end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, numel_of
from pymerge.ops._singular import numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Boost(Op["Tensor"]):
    """X' = U diag(max(s, s_c)) V^T of X = U diag(s) V^T, d_out x d_in, in X's dtype; computed in float64.

    c is the first index at which the singular values so far, descending, are the share `beta` of their sum. Those that
    are rounding stay 0: their directions are arbitrary.

    Source: Subspace-Boosted Model Merging, arXiv 2506.16506; the sums are of s, and not of s^2, as in its port to
    FusionBench.
    """

    summary = "small singular values of a merged delta raised (Subspace-Boosting)"

    delta: ArrayLike  # X, d_out x d_in, float32 or float64
    beta: float = 0.01  # 0 to 1; 0 makes all singular values the largest

    def check(self) -> None:
        """Raise ArgumentError unless X is a matrix and beta a share."""
        if len(self.delta.shape) != 2:
            raise ArgumentError(f"boost: the delta has shape {tuple(self.delta.shape)}, expected 2 dimensions")
        if not 0 <= self.beta <= 1:
            raise ArgumentError(f"boost: beta is {self.beta}; give a share from 0 to 1")

    def reference(self) -> Tensor:
        """One decomposition."""
        X = as_tensor(self.delta)
        if numel_of(X) == 0:
            return X.clone()
        U, s, V = numerical_triplets(X, min(X.shape))
        if len(s) == 0:
            return X.clone()
        reached = s.cumsum(dim=0) >= self.beta * s.sum() * (1.0 - 1e-12)  # the last sum is the whole but for rounding
        boosted: Tensor = (U * s.clamp(min=float(s[int(reached.int().argmax())]))) @ V.mT
        return boosted.to(X.dtype)
