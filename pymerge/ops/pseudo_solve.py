"""The minimum-norm solution of X A = B, by the eigenvectors of A above a cutoff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops._singular import eigenvectors
from pymerge.ops.gradient_flow import check_system

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PseudoSolve(Op["Tensor"]):
    """X = B A^+, d_out x d_in, where eigenvalues of A at or below a share of the largest count as 0.

    Source: the Moore-Penrose inverse, with the relative cutoff of torch.linalg.pinv as an argument.
    """

    summary = "X = B A^+ with a relative cutoff"

    A: Tensor  # d_in x d_in, symmetric positive semi-definite, float32 or float64
    B: Tensor  # d_out x d_in, same dtype
    cutoff: float  # at least 0, below 1

    def check(self) -> None:
        """Raise ArgumentError unless A and B fit and the cutoff is a share."""
        check_system("pseudo_solve", self.A, self.B)
        if not 0 <= self.cutoff < 1:
            raise ArgumentError(f"pseudo_solve: cutoff is {self.cutoff}; give a share from 0 to below 1")

    @property
    def like(self) -> Tensor:
        """B: the work is a layer's, d_out x d_in."""
        return self.B

    def reference(self) -> Tensor:
        """By LAPACK's eigenvectors on one thread: the same bits for any number of threads."""
        import torch

        if self.A.numel() == 0:
            return torch.zeros_like(self.B)
        values, vectors = eigenvectors(self.A)
        basis = vectors[:, values > self.cutoff * values[-1].clamp(min=0.0)]
        X: Tensor = (self.B @ basis / values[len(values) - basis.shape[1] :]) @ basis.mT
        return X
