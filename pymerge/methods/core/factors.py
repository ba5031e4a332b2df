"""Task vectors as products of factors, tau_t = B_t A_t, and the row space that all of them lie in.

Arrays of numpy, in float64: what is computed of factors is small, and takes less time than importing PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pymerge.common.arrays import Array, ArrayLike
from pymerge.ops._op import Op
from pymerge.ops.low_rank_sum import LowRankSum

Matrix = NDArray[Any]  # float64, unless it says otherwise
# Runs an op on the chosen backend.
Run = Callable[[Op[Any]], Any]

# A product whose norm is below this share of its factors' is rounding: its columns cancel each other.
_ROUNDING = 1e-14
# Most that inner products of columns may differ from orthonormal ones where a second Cholesky factor makes them
# so to rounding.
_NEARLY_ORTHONORMAL = 1e-2
# Rows of a long matrix that are multiplied at once.
_ROWS = 512


class Factors(NamedTuple):
    """tau_t = B A of a linear weight, d_out x d_in; of rank 0 where the task did not touch it."""

    B: Matrix  # d_out x r
    A: Matrix  # r x d_in

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def finite(self) -> bool:
        """Whether neither factor holds NaN or infinity."""
        return bool(np.isfinite(self.B).all()) and bool(np.isfinite(self.A).all())


class Delta(Protocol):
    """scale * X of a weight, which nobody forms as a whole."""

    def prepared(self, double: bool, in_axis: int) -> Delta:
        """It in the dtype of the sum with W_0, float64 or float32, for rows as they are stored."""

    def add(self, run: Run, base: ArrayLike, first: int, out: ArrayLike) -> None:
        """Write W_0 plus rows from `first` on to `out`, rounded once; of what is prepared.

        Args:
            base: these rows of W_0; of at least that dtype's precision or less.
            out: contiguous memory for as many.
        """


class Product(NamedTuple):
    """X = P K, scales in K."""

    P: Matrix  # d_out x k
    K: Matrix  # k x d_in

    def times(self, scale: float) -> Product:
        """scale * X."""
        return Product(self.P, self.K * scale)

    def whole(self) -> Matrix:
        """X, d_out x d_in."""
        return self.P @ self.K

    def prepared(self, double: bool, in_axis: int) -> Product:
        """See `Delta`."""
        left, right = (self.K.T, self.P.T) if in_axis == 0 else (self.P, self.K)
        kind = np.float64 if double else np.float32
        return Product(np.ascontiguousarray(left, kind), np.ascontiguousarray(right, kind))

    def add(self, run: Run, base: ArrayLike, first: int, out: ArrayLike) -> None:
        """See `Delta`. Every element has the same bits, whichever rows are asked for."""
        rows = self.P[first : first + base.shape[0]]
        run(LowRankSum(base, Array.of(rows), Array.of(self.K), out=out))


@dataclass(frozen=True, eq=False)
class RowSpace:
    """tau_t = B_t L_t Q^T of the tasks that are not zero, with orthonormal columns Q, d_in x q, q <= d_in.

    Q spans the rows of all A_t, those of zero tasks too, and `beside`, rows that were asked for: beside = U Q^T.
    """

    shape: tuple[int, int]  # (d_out, d_in)
    B: tuple[Matrix, ...]  # of each task d_out x r_t
    L: tuple[Matrix, ...]  # of each task r_t x q
    Q: Matrix
    norms: tuple[float, ...]  # n_t, squared Frobenius norms, above 0
    U: Matrix  # rows x q, of `beside`

    def __len__(self) -> int:
        """Number of tasks that are not zero."""
        return len(self.B)

    @property
    def joined(self) -> Matrix:
        """[B_1 .. B_T], d_out x R."""
        return np.concatenate(self.B, axis=1)

    def grams(self, B: Sequence[Matrix]) -> list[Matrix]:
        """L_t^T (B_t^T B_t) L_t of each task, q x q."""
        return [L.T @ (left.T @ left) @ L for L, left in zip(self.L, B, strict=True)]

    def product(self, P: Matrix, core: Matrix) -> Product:
        """X = P core Q^T, by the smaller of the ranks that it can have."""
        if P.shape[1] > self.Q.shape[1]:
            return Product(P @ core, self.Q.T)
        return Product(P, core @ self.Q.T)

    def only(self, kept: Sequence[int]) -> RowSpace:
        """The same space with some of its tasks."""
        B, L = (tuple(part[t] for t in kept) for part in (self.B, self.L))
        return replace(self, B=B, L=L, norms=tuple(self.norms[t] for t in kept))


def row_space(tasks: Sequence[Factors], beside: Matrix | None = None) -> RowSpace:
    """The space of the rows of all tasks, finite, of one shape; `beside`: further rows that it contains."""
    shape = tasks[0].shape
    rows = np.zeros((0, shape[1])) if beside is None else beside
    Q, R = orthonormal(np.concatenate([*(task.A for task in tasks), rows]).T)
    *L, U = split([*(len(task.A) for task in tasks), len(rows)], R.T, axis=0)
    norms = [float(((task.B.T @ task.B @ part) * part).sum()) for task, part in zip(tasks, L, strict=True)]
    sizes = [float(np.linalg.norm(task.B) * np.linalg.norm(task.A)) for task in tasks]
    kept = [t for t, size in enumerate(sizes) if norms[t] > (_ROUNDING * size) ** 2]
    B = tuple(tasks[t].B for t in kept)
    return RowSpace(shape, B, tuple(L[t] for t in kept), Q, tuple(norms[t] for t in kept), U)


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


def split(sizes: Sequence[int], M: Matrix, axis: int) -> list[Matrix]:
    """Parts of a matrix, of these sizes along an axis."""
    return np.split(M, np.cumsum(sizes)[:-1], axis=axis)


def total_of(matrices: Iterable[Any]) -> Any:
    """The sum of one or more arrays or tensors, in their order; of one, itself."""
    total, *others = matrices
    for other in others:
        total = total + other
    return total


def nothing(shape: tuple[int, int]) -> Product:
    """X = 0."""
    return Product(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def plain_sum(tasks: Sequence[Factors], weight: float = 1.0) -> Product:
    """X = weight * sum_t tau_t."""
    return Product(
        np.concatenate([task.B for task in tasks], axis=1), np.concatenate([task.A for task in tasks])
    ).times(weight)
