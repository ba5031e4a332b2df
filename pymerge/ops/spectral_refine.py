"""ACE's spectral refinement: adds an isotropic term along the leading singular directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix
from pymerge.ops._singular import Matrix, numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpectralRefine(Op["Tensor"]):
    """X + mean(s_1..s_k) U_k V_k^T with U S V^T the singular value decomposition of D + X.

    Computed in float64: the truncated polar factor amplifies errors by 1 / (s_k - s_{k+1}). The mean is over k values,
    and directions whose singular value is rounding are left out of U_k V_k^T: where the rank is below k, the published
    form adds arbitrary directions there, so that it is not defined.

    Source: ACE-Merging, arXiv 2603.02945, spectral refinement.
    """

    summary = "ACE's isotropic term along the top-k singular directions"

    X: Tensor  # preconditioned merge, d_out x d_in, float32 or float64
    D: Tensor  # structural residual, same shape
    k: int  # number of leading singular directions, 1 to min(d_out, d_in)

    def check(self) -> None:
        """Raise ArgumentError unless X and D are matrices of one shape and 1 <= k <= min(shape)."""
        X, k = self.X, self.k
        if X.ndim != 2:
            raise ArgumentError(f"spectral_refine: X has shape {tuple(X.shape)}, expected a matrix")
        check_matrix("spectral_refine", "D", self.D, (X.shape[0], X.shape[1]))
        if not 1 <= k <= min(X.shape):
            raise ArgumentError(f"spectral_refine: k is {k}; give 1 to {min(X.shape)} for shape {tuple(X.shape)}")

    def reference(self) -> Tensor:
        """X in its own dtype, the term rounded to it once."""
        X = self.X
        refined: Tensor = X + isotropic_term(self.D.double() + X.double(), self.k).to(X.dtype)
        return refined


def isotropic_term(M: Matrix, k: int, larger: int | None = None) -> Matrix:
    """mean(s_1..s_k) U_k V_k^T of M in float64; `larger`: of the sides of the weight that M is the core of."""
    U, s, V = numerical_triplets(M, k, larger=larger)
    return s.sum() / k * (U @ V.T)
