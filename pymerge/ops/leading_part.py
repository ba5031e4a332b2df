"""Part of a matrix that its leading singular directions hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops._singular import numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LeadingPart(Op["Tensor"]):
    """U_q diag(s_q) V_q^T of X = U diag(s) V^T, d_out x d_in, in X's dtype; computed in float64.

    q is `rank`, or the least number of directions whose singular values make up the share `total` of all; what is kept
    may be `restored` to the sum of all singular values. Those that are rounding are never kept.

    Source: the truncation of STAR, arXiv 2502.10339 (total, restored), and of CART, arXiv 2412.12153 (rank).
    """

    summary = "leading singular directions of a matrix, by number or by their share of the nuclear norm"

    delta: ArrayLike  # X, d_out x d_in, float32 or float64
    rank: int | None = None  # at least 0
    total: float | None = None  # in place of rank: above 0, at most 1
    restored: bool = False

    def check(self) -> None:
        """Raise ArgumentError unless X is a matrix, with a number of directions or a share of them."""
        if len(self.delta.shape) != 2:
            raise ArgumentError(f"leading_part: the matrix has shape {tuple(self.delta.shape)}, expected 2 dimensions")
        if (self.rank is None) == (self.total is None):
            raise ArgumentError("leading_part: give a rank, or a share as total, and not both")
        if self.rank is not None and self.rank < 0:
            raise ArgumentError(f"leading_part: rank is {self.rank}; give at least 0")
        if self.total is not None and not 0 < self.total <= 1:
            raise ArgumentError(f"leading_part: total is {self.total}; give a share above 0 up to 1")

    def reference(self) -> Tensor:
        """One decomposition."""
        X = as_tensor(self.delta)
        size = min(X.shape)
        rank = size if self.rank is None else min(size, self.rank)
        U, s, V = numerical_triplets(X, size if self.restored else rank)
        kept = min(rank, len(s))
        if self.total is not None and kept:
            reached = s.cumsum(dim=0) >= self.total * (1.0 - 1e-12) * s.sum()  # the sum of all but for rounding
            kept = int(reached.int().argmax()) + 1
        values = s[:kept]
        if self.restored and kept:
            values = values * (s.sum() / values.sum())
        part: Tensor = (U[:, :kept] * values) @ V[:, :kept].mT
        return part.to(X.dtype)
