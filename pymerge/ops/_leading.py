"""Leading eigenvectors of large symmetric matrices by products alone, as many as converge soon."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Columns that are iterated on, and the least size of a matrix beside which they are few.
_COLUMNS, _LEAST = 128, 512
# Products with them, at most: beside n products of a matrix with itself they cost nothing.
_PRODUCTS = 10
# Lengths of residuals, as a share of the largest eigenvalue, that are no more than the rounding of the products.
_CONVERGED = {4: 4e-7, 8: 1e-14}


class Leading(NamedTuple):
    """Orthonormal eigenvectors of a matrix, n x k, and their eigenvalues, those that are not in here being smaller."""

    vectors: Tensor
    values: Tensor


def leading_eigenvectors(A: Tensor, enough: float) -> Leading | None:
    """The leading eigenvectors of a symmetric positive semi-definite A (n x n) that converge in a few products.

    Subspace iteration from a fixed start, with a Chebyshev polynomial of degree 2 for a filter, until what is left is
    at most `enough`. None of small matrices, and where nothing converges.
    """
    import torch

    if len(A) < _LEAST:
        return None
    start = torch.randn(len(A), _COLUMNS, generator=torch.Generator().manual_seed(0), dtype=A.dtype).to(A.device)
    vectors, found, products = _orthonormal(start), None, 0
    while products < _PRODUCTS:
        images = A @ vectors
        values, turned, images = _ritz(vectors, images)
        found = _converged(values, turned, images)
        products += 1
        count = 0 if found is None else len(found.values)
        if count == _COLUMNS or (count and float(values[count]) <= enough):
            break
        # T_2 of A, mapped so that the interval up to the smallest Ritz value is [-1, 1].
        lowest = values[-1].clamp(min=torch.finfo(A.dtype).tiny)
        first = images * (2.0 / lowest) - turned
        vectors = _orthonormal((A @ first).mul_(4.0 / lowest).sub_(first, alpha=2.0).sub_(turned))
        products += 1
    return found


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


def _converged(values: Tensor, vectors: Tensor, images: Tensor) -> Leading | None:
    """Those before the first that has not converged."""
    residuals = (images - vectors * values).norm(dim=0).tolist()
    most = _CONVERGED[values.element_size()] * float(values[0])
    count = next((index for index, residual in enumerate(residuals) if residual > most), len(residuals))
    return Leading(vectors[:, :count], values[:count]) if count else None
