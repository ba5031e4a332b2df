"""ACE's spectral refinement: adds an isotropic term along the leading singular directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import matmul
from typing import TYPE_CHECKING, NamedTuple

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix
from pymerge.ops._singular import (
    WEIGHT_EPS,
    Gram,
    Matrix,
    Times,
    numerical_triplets_and_values,
    singular_vectors,
    whole_gram,
)

if TYPE_CHECKING:
    from torch import Tensor

# Errors of the eigenvalues of a float64 Gram as a share of the largest, about, and how far they may turn a direction at
# the cut into the next one before an SVD tells them apart.
_OF_GRAM, _TURNED = 1e-15, 1e-5


class Refined(NamedTuple):
    """X with its term, and how far the term moves with D + X."""

    X: Tensor  # d_out x d_in, in X's dtype
    # To first order the Frobenius norm of the term's error over that of an error of D + X, of one that is even in all
    # directions; infinity where the k-th singular value is the next one, too.
    sensitivity: float
    # Of s_1..s_k, the least distance from what counts as rounding: an error as large may leave a direction
    # out, or let one in.
    margin: float


@dataclass(frozen=True, eq=False)
class SpectralRefine(Op[Refined]):
    """X + mean(s_1..s_k) U_k V_k^T with U S V^T the singular value decomposition of D + X.

    Decomposed in float64: the truncated polar factor amplifies errors by 1 / (s_k - s_{k+1}). The mean is over k
    values, and directions whose singular value is rounding are left out of U_k V_k^T: where the rank is below k, the
    published form adds arbitrary directions there, so that it is not defined.

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

    def reference(self) -> Refined:
        """X in its own dtype, the term rounded to it once."""
        left, right, *doubts = term_factors(self.D.double() + self.X.double(), self.k)
        return Refined(self.X + (left @ right.mT).to(self.X.dtype), *doubts)


def term_factors(
    M: Matrix, k: int, gram: Gram = whole_gram, times: Times = matmul
) -> tuple[Matrix, Matrix, float, float]:
    """Factors of `isotropic_term` of a matrix, d_out x r and d_in x r for r <= k, its sensitivity and its margin."""
    U, s, V = numerical_triplets_and_values(M, k, gram=gram, times=times)
    count = U.shape[1]
    if not count:
        return U, V, 0.0, math.inf
    if count < len(s) and _OF_GRAM * float(s[0]) ** 2 > _TURNED * float(s[count - 1] ** 2 - s[count] ** 2):
        left, s, right = singular_vectors(M)
        U, V = left[:, :count], right[:count].T
    mean = float(s[:k].sum()) / k
    margin = float((s[:k] - max(M.shape) * WEIGHT_EPS * s[0]).abs().min())
    sensitivity = mean * _sensitivity(s, count, abs(M.shape[0] - M.shape[1])) / math.sqrt(M.shape[0] * M.shape[1])
    return U * mean, V, sensitivity, margin


def isotropic_term(M: Matrix, k: int, larger: int | None = None) -> Matrix:
    """mean(s_1..s_k) U_k V_k^T of M in float64; `larger`: of the sides of the weight that M is the core of."""
    U, s, V = numerical_triplets_and_values(M, k, larger=larger)
    return s[:k].sum() / k * (U @ V.T)


def _sensitivity(s: Tensor, count: int, beyond: int) -> float:
    """Frobenius norm of the error of U_k V_k^T, for errors of M of variance 1 in all elements; s: all singular values,
    `beyond` the difference of the sides.

    An error E, in the basis of singular vectors, turns two kept directions by (E_ij - E_ji) / (s_i + s_j), a kept one
    and one that isn't by (s_i E_ij + s_j E_ji) / (s_i^2 - s_j^2), and one out of M's span by E_ij / s_i.
    """
    squares = s.square()
    kept, rest = squares[:count], squares[count:]
    across = 2.0 * ((kept[:, None] + rest) / (kept[:, None] - rest).square()).sum()
    inside = (2.0 / (s[:count, None] + s[:count]).square()).sum() - (0.5 / kept).sum()
    return math.sqrt(float(across + inside + beyond * (1.0 / kept).sum()))
