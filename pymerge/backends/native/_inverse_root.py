"""Inverse square root of a Gram matrix by products in float32, checked in float64: polar factors without eigenvectors.

For Grams whose eigenvalues, but for few large ones, lie within a factor of `_LARGEST_SPREAD`: those of deltas of low
rank and noise, where one side is longer than the other.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pymerge.backends.native._products import symmetric_product
from pymerge.ops._op import one_thread, times_vector
from pymerge.ops.gradient_flow import chebyshev_sum

if TYPE_CHECKING:
    from torch import Tensor

# Smaller matrices are decomposed in less time than this takes.
SMALLEST = 768
# The longer side of a matrix of noise as a multiple of the shorter: below, some singular values are too small.
_LONG = 1.5
# Share of the directions, at least so many, that are looked at for large eigenvalues, and iterations on them.
_HEAD_SHARE, _HEAD, _HEAD_ITERATIONS = 16, 128, 6
# Largest residual of an eigenvector of the head, as a share of the geometric mean of its eigenvalue and the others'.
_RESIDUAL = 1e-7
_LANCZOS_STEPS = 24
# Larger quotients of eigenvalues take more products than eigenvectors take time.
_LARGEST_SPREAD = 64.0
# What the series may leave out, of an inverse root: a step of Newton's iteration squares it.
_TOLERANCE = 1e-3
_MOST_TERMS = 64
_PROBES = 16
# Most that ||K G K - I||_F may be of the root of n. A polar factor M K is no further than that from the exact one, as a
# share of its norm.
LARGEST_ERROR = 2e-6


def is_long(rows: int, columns: int) -> bool:
    """Whether the Gram of the shorter side of a matrix may have an inverse root by products."""
    return min(rows, columns) >= SMALLEST and max(rows, columns) >= _LONG * min(rows, columns)


class _Head(NamedTuple):
    """Eigenvalues that are far above the others, in float64, and eigenvectors; a value above the others."""

    values: Tensor
    vectors: Tensor
    next: float


class InverseRoot(NamedTuple):
    """K = G^(-1/2) as I + V diag(factors) V^T on the head, times `even` on all of it."""

    even: Tensor  # n x n, symmetric, float32
    vectors: Tensor  # n x h, float64, orthonormal
    factors: Tensor  # h
    trace: float  # of G^(1/2): of a matrix with this Gram, the sum of the singular values

    def after(self, M: Tensor) -> Tensor:
        """M K in float32, for M of m x n in float64, which is overwritten: its large directions are made level with the
        others first, so that their rounding is."""
        M.addmm_((M @ self.vectors).mul_(self.factors), self.vectors.mT)
        return M.to(self.even.dtype) @ self.even


def inverse_root(gram: Tensor, least: float = 0.0) -> InverseRoot | None:
    """K of a positive definite G, n x n in float64, which is overwritten; None where it would not be exact enough, or
    the smallest eigenvalue may be less than this share of the largest.

    G's large eigenvalues are set to one just above the others, which leaves float32 its digits for these; a Chebyshev
    series gives the inverse root of that, and a step of Newton's iteration, K (3 I - K G K) / 2, its last digits. Then
    ||K G K - I||_F is measured, on random vectors in float64.
    """
    import torch

    with one_thread():  # what decides must not depend on their number
        head = _head(gram)
        if head is None:
            return None
        level, vectors = head.next, head.vectors
        gram.addmm_(vectors * (level - head.values), vectors.mT).div_(level)
        single = gram.to(torch.float32)
        low, high = _extremes(single)
    largest = max(level * high, *head.values[:1].tolist(), 0.0)
    if not (0.0 < high <= _LARGEST_SPREAD * low and level * low > 2.0 * least * largest):
        return None
    K = _series(single, 0.9 * low, max(1.02 * high, 1.0))
    residual = symmetric_product(K, symmetric_product(single, K)).mul_(-0.5)
    residual.diagonal().add_(1.5)
    K = symmetric_product(K, residual)
    with one_thread():
        if not _error(K, gram) <= LARGEST_ERROR:
            return None
    root = level**0.5
    trace = root * (float((gram * K).sum()) - len(head.values)) + float(head.values.sqrt().sum())
    return InverseRoot(K.div_(root), vectors, root * head.values.rsqrt() - 1.0, trace)


def _head(gram: Tensor) -> _Head | None:
    """The eigenvectors that a few iterations on a random subspace resolve; None where none of the rest is left."""
    import torch

    size = len(gram)
    count = min(max(_HEAD, size // _HEAD_SHARE), size // 4)
    basis = torch.randn(size, count, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    for _ in range(_HEAD_ITERATIONS):
        basis, _ = torch.linalg.qr(gram @ basis)
    image = gram @ basis
    values, turn = torch.linalg.eigh(basis.mT @ image)
    values, turn = values.flip(0), turn.flip(1)
    vectors = basis @ turn
    rest = float(gram.diagonal().sum() - values.sum()) / (size - count)
    if not (rest > 0.0 and bool((values > 0.0).all())):
        return None
    residuals = torch.linalg.vector_norm(image @ turn - vectors * values, dim=0)
    resolved = residuals <= _RESIDUAL * (values * rest).sqrt()
    many = min(int(resolved.int().cumprod(0).sum()), count - 1)
    return _Head(values[:many], vectors[:, :many], 1.2 * float(values[many]))


def _extremes(S: Tensor) -> tuple[float, float]:
    """Estimates of the smallest and the largest eigenvalue, by Lanczos' iteration with all vectors kept orthogonal."""
    import torch

    start = torch.randn(len(S), 1, generator=torch.Generator().manual_seed(1), dtype=S.dtype)
    basis = start / start.norm()
    diagonal, beside = [], []
    for step in range(_LANCZOS_STEPS):
        image = times_vector(S, basis[:, step : step + 1])
        diagonal.append(float(basis[:, step] @ image[:, 0]))
        for _ in range(2):
            image -= basis @ (basis.mT @ image)
        length = float(image.norm())
        if length <= 1e-6 or step + 1 == _LANCZOS_STEPS:
            break
        beside.append(length)
        basis = torch.cat([basis, image / length], dim=1)
    found = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return float(found[0]), float(found[-1])


@lru_cache(maxsize=64)
def _coefficients(spread: float) -> tuple[float, ...]:
    """Chebyshev coefficients of x^(-1/2) on [1, spread], without a tail that sums to the tolerance."""
    angles = (np.arange(_MOST_TERMS) + 0.5) * (np.pi / _MOST_TERMS)
    x = (np.cos(angles) * (spread - 1.0) + spread + 1.0) / 2.0
    found = (2.0 / _MOST_TERMS) * (np.cos(np.outer(np.arange(_MOST_TERMS), angles)) @ x**-0.5)
    found[0] /= 2.0
    tail = np.cumsum(np.abs(found[::-1]))[::-1]
    return tuple(found[: max(4, int((tail > _TOLERANCE * spread**-0.5).sum()))].tolist())


def _series(S: Tensor, low: float, high: float) -> Tensor:
    """S^(-1/2) of eigenvalues from low to high, as far as the tolerance."""
    S = S.clone()
    S.diagonal().sub_(low)
    coefficients = _coefficients(high / low)
    return chebyshev_sum(S, 2.0 / (high - low), coefficients, symmetric_product).mul_(low**-0.5)


def _error(K: Tensor, gram: Tensor) -> float:
    """Estimate of ||K G K - I||_F over the root of n, from random vectors."""
    import torch

    size, root = len(gram), K.to(gram.dtype)
    probes = torch.randn(size, _PROBES, generator=torch.Generator().manual_seed(2), dtype=gram.dtype)
    error = float((root @ (gram @ (root @ probes)) - probes).norm()) / math.sqrt(_PROBES * size)
    return error if math.isfinite(error) else math.inf
