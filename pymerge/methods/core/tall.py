"""Tall matrices, as the factors of all tasks are side by side: their Gram matrices and orthonormal bases.

They are float32 where that holds them, and worked on in float64 a few rows at a time: nothing as large is made of them
but where their columns nearly depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]  # float64, unless it says otherwise

# Most that inner products of columns may differ from orthonormal ones where a second Cholesky factor makes them
# so to rounding.
_NEARLY_ORTHONORMAL = 1e-2
# Bounds of the condition number of columns of length 1, squared. Up to the first, rounding of one Cholesky factor is of
# the twelfth digit and beyond; up to the second, that of M R^-1.
_ONCE, _TWICE = 2e3, 1e6
# Rows of a long matrix that are multiplied at once: as many elements, or rows.
_ELEMENTS, _ROWS = 2**16, 512


@dataclass(frozen=True, eq=False)
class Tall:
    """[M | 1] of n rows, M n x R, with the column of ones where it is asked for."""

    M: Matrix  # float32 or float64
    ones: bool = False

    def __len__(self) -> int:
        return int(self.M.shape[0])

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.M.shape[1]) + self.ones

    def rows(self, start: int, stop: int, kind: type = np.float64) -> Matrix:
        """Some rows, in float64 or another type."""
        part = self.M[start:stop]
        if not self.ones:
            return part.astype(kind, copy=False)
        found: Matrix = np.ones((len(part), self.width), kind)
        found[:, :-1] = part
        return found

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """All rows in float64, a few at a time, with their places."""
        step = max(_ROWS, _ELEMENTS // max(1, self.width) // _ROWS * _ROWS)
        for first in range(0, len(self), step):
            yield slice(first, first + step), self.rows(first, first + step)

    def whole(self) -> Matrix:
        """All of it in float64."""
        return self.rows(0, len(self))

    def times(self, X: Matrix) -> Matrix:
        """It times a matrix."""
        found = np.empty((len(self), X.shape[1]))
        for place, rows in self.blocks():
            np.matmul(rows, X, out=found[place])
        return found

    def means(self) -> Matrix:
        """The mean of each column, 1 x width."""
        total = np.zeros((1, self.width))
        for _, rows in self.blocks():
            total += rows.sum(axis=0, keepdims=True)
        return total / max(1, len(self))

    def gram(self, X: Matrix | None = None, less: Matrix | None = None) -> Matrix:
        """G^T G of G = it, or it times X, or less a row."""
        total = np.zeros((self.width if X is None else X.shape[1],) * 2)
        for _, rows in self.blocks():
            if less is not None:
                rows = rows - less
            if X is not None:
                rows = rows @ X
            total += rows.T @ rows
        return total


@dataclass(frozen=True, eq=False)
class Basis:
    """Q R of a tall matrix, with orthonormal columns Q = M X, as many as its smaller side."""

    tall: Tall  # M; float64 and Q itself where X is the unit matrix
    X: Matrix
    R: Matrix

    @property
    def size(self) -> int:
        """Number of columns of Q."""
        return int(self.X.shape[1])

    def matrix(self) -> Matrix:
        """Q."""
        return self.tall.times(self.X)


def basis_of(tall: Tall, gram: Matrix | None = None) -> Basis:
    """The basis of a tall matrix, of which somebody may know the Gram matrix.

    By its Cholesky factor, or where that has lost digits by another one of what it makes of the matrix. Columns that
    nearly depend on each other are left to `orthonormal`, and Q is formed.
    """
    if tall.width <= len(tall):
        gram = tall.gram() if gram is None else gram
        sizes = np.sqrt(np.diag(gram))
        if sizes.all():
            try:
                return _by_gram(tall, gram, sizes)
            except np.linalg.LinAlgError:  # not positive definite, or nearly so
                pass
    Q, R = orthonormal(tall.whole())
    return Basis(Tall(Q), np.eye(Q.shape[1]), R)


def _by_gram(tall: Tall, gram: Matrix, sizes: Matrix) -> Basis:
    """The basis from a Gram matrix; LinAlgError where that has lost too many digits."""
    scaled = gram / sizes / sizes[:, None]
    R = np.linalg.cholesky(scaled).T
    X = np.linalg.inv(R)
    # Its largest eigenvalue, and that of its inverse, are no larger than these.
    bound = float(np.abs(scaled).sum(axis=0).max(initial=0.0) * np.square(X).sum())
    if bound > _TWICE:
        raise np.linalg.LinAlgError
    R, X = R * sizes, X / sizes[:, None]
    if bound > _ONCE:
        again = np.linalg.cholesky(tall.gram(X)).T
        R, X = again @ R, X @ np.linalg.inv(again)
    return Basis(tall, X, R)


def orthonormal(M: Matrix) -> tuple[Matrix, Matrix]:
    """Q and R of M = Q R, with orthonormal columns Q, as many as M's smaller side.

    By Cholesky factors of the Gram matrix, twice, which is several times faster than reflections: the second time makes
    up for what the first one loses. Columns that nearly depend on each other are left to reflections.
    """
    gram: Matrix = M.T @ M
    sizes = np.sqrt(np.diag(gram))
    if M.shape[1] <= M.shape[0] and sizes.all():
        try:
            once = np.linalg.cholesky(gram / sizes / sizes[:, None]).T * sizes
            Q = _times(M, np.linalg.inv(once), np.empty(M.shape))
            gram = Q.T @ Q
            if np.abs(gram - np.eye(len(gram))).max(initial=0.0) < _NEARLY_ORTHONORMAL:
                twice = np.linalg.cholesky(gram).T
                return _times(Q, np.linalg.inv(twice), Q), twice @ once
        except np.linalg.LinAlgError:  # not positive definite
            pass
    Q, R = np.linalg.qr(M)
    return Q, R


def _times(M: Matrix, X: Matrix, out: Matrix) -> Matrix:
    """M X, X square, a few rows at a time: `out` may be M."""
    for first in range(0, len(M), _ROWS):
        out[first : first + _ROWS] = M[first : first + _ROWS] @ X
    return out
