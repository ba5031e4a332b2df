"""Singular values shrunk: thresholding, and the exact steps of penalties on the nuclear norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops._singular import numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["svt", "exact_nuc", "exact_sq"]
RULES: tuple[Rule, ...] = ("svt", "exact_nuc", "exact_sq")


@dataclass(frozen=True, eq=False)
class Shrink(Op["Tensor"]):
    """U diag(max(s - threshold, 0)) V^T of M = U diag(s) V^T, d_out x d_in, in M's dtype; computed in float64.

    The threshold is mu ("svt"), mu / 2 ("exact_nuc": the minimiser of ||D - M||_F^2 + mu ||D||_*), or mu S with S the
    nuclear norm of the result ("exact_sq": that of ||D - M||_F^2 + mu ||D||_*^2). Singular values that are rounding
    count as 0.

    Source: LoRE-Merging, arXiv 2502.10749: thresholding as its algorithm has it, and the steps of what it minimises.
    """

    summary = "singular values of a matrix shrunk, by a threshold or a penalty's exact step"

    matrix: ArrayLike  # M, d_out x d_in, float32 or float64
    mu: float  # at least 0
    rule: Rule = "svt"

    def check(self) -> None:
        """Raise ArgumentError unless M is a matrix, mu at least 0 and the rule known."""
        if len(self.matrix.shape) != 2:
            raise ArgumentError(f"shrink: the matrix has shape {tuple(self.matrix.shape)}, expected 2 dimensions")
        if not self.mu >= 0:
            raise ArgumentError(f"shrink: mu is {self.mu}; give at least 0")
        if self.rule not in RULES:
            raise ArgumentError(f"shrink: rule is {self.rule!r}; choose one of {', '.join(RULES)}")

    def reference(self) -> Tensor:
        """One decomposition."""
        M = as_tensor(self.matrix)
        U, s, V = numerical_triplets(M, min(M.shape))
        shrunk: Tensor = (U * (s - self._threshold(s)).clamp(min=0.0)) @ V.mT
        return shrunk.to(M.dtype)

    def _threshold(self, s: Tensor) -> float:
        """Amount that is taken from the singular values, descending."""
        import torch

        if self.rule == "svt":
            return self.mu
        if self.rule == "exact_nuc":
            return self.mu / 2
        if len(s) == 0:
            return 0.0
        # The nuclear norm of the result if the q largest stay, and the most of which all do.
        norms = s.cumsum(dim=0) / (1.0 + self.mu * torch.arange(1, len(s) + 1, device=s.device, dtype=s.dtype))
        kept = int((s > self.mu * norms).sum())
        return self.mu * float(norms[kept - 1])
