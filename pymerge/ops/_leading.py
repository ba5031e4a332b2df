"""Leading eigenvectors of large symmetric matrices by products alone, as many as converge soon."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Least size of a matrix that eigenvectors are taken out of, and the columns that are iterated on: few beside it.
LEAST = 512
_COLUMNS = 128
# Rounds of two products with these columns, at most: a few in float32, then in float64. Beside the products of n x n
# matrices that they save they cost little.
_ROUNDS, _EXACT_ROUNDS = 4, 2
# Residuals up to this share of the largest eigenvalue are the rounding of float32.
_ROUNDING = 1.5e-6
# Rows of a float32 matrix that are taken to float64 at once.
_ROWS = 512


class Leading(NamedTuple):
    """Orthonormal eigenvectors of a matrix, n x k, and their eigenvalues, float64; all others are smaller."""

    vectors: Tensor
    values: Tensor


def leading_eigenvectors(A: Tensor, enough: float, exact: float) -> Leading | None:
    """The leading eigenvectors of a symmetric positive semi-definite A (n x n) that converge in a few products.

    Subspace iteration from a fixed start, with a Chebyshev polynomial of degree 2 for a filter, until all that is left
    is at most `enough`. ||A v - lambda v|| is at most `exact` for all of them, which takes float64 for float32
    matrices, too. None of small matrices, and where nothing converges.
    """
    import torch

    if len(A) < LEAST:
        return None
    start = torch.randn(len(A), _COLUMNS, generator=torch.Generator().manual_seed(0), dtype=A.dtype).to(A.device)
    vectors, found = _orthonormal(start), None
    rounds = _ROUNDS if A.dtype == torch.float32 else _ROUNDS + _EXACT_ROUNDS
    while rounds:
        double = vectors.dtype == torch.float64
        values, vectors, images = _ritz(vectors, _times(A, vectors))
        found = _converged(values, vectors, images, exact if double else _ROUNDING * float(values[0]))
        rounds -= 1
        count = 0 if found is None else len(found.values)
        done = count == _COLUMNS or (count > 0 and float(values[count]) <= enough)
        if double and (done or not rounds):
            return found
        # T_2 of A, mapped so that the interval up to the smallest Ritz value is [-1, 1].
        lowest = values[-1].clamp(min=torch.finfo(A.dtype).tiny)
        first = images * (2.0 / lowest) - vectors
        if not double and (done or not rounds):
            first, vectors, lowest, rounds = first.double(), vectors.double(), lowest.double(), _EXACT_ROUNDS
        vectors = _orthonormal(_times(A, first).mul_(4.0 / lowest).sub_(first, alpha=2.0).sub_(vectors))
    return found


def _times(A: Tensor, vectors: Tensor) -> Tensor:
    """A times some columns in their dtype, which may be the wider one."""
    import torch

    if A.dtype == vectors.dtype:
        return A @ vectors
    parts = [A[start : start + _ROWS].to(vectors.dtype) @ vectors for start in range(0, len(A), _ROWS)]
    return torch.cat(parts)


def _orthonormal(M: Tensor) -> Tensor:
    """An orthonormal basis of the columns, on one thread."""
    import torch

    with one_thread():
        basis: Tensor = torch.linalg.qr(M)[0]
    return basis


def _ritz(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values of a basis, descending, Ritz vectors, and their images."""
    import torch

    small = vectors.mT @ images
    with one_thread():
        values, turn = torch.linalg.eigh((small + small.mT) / 2.0)
    turn = turn.flip(1)
    return values.flip(0), vectors @ turn, images @ turn


def _converged(values: Tensor, vectors: Tensor, images: Tensor, most: float) -> Leading | None:
    """Leading pairs before the first whose residual is longer than `most`."""
    residuals = (images - vectors * values).norm(dim=0).tolist()
    count = next((index for index, residual in enumerate(residuals) if not residual <= most), len(residuals))
    return Leading(vectors[:, :count], values[:count]) if count else None
