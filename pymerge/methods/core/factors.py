"""Task vectors as products of factors, tau_t = B_t A_t, and the row space that all of them lie in.

Arrays of numpy: what is computed of factors is small, and takes less time than importing PyTorch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, overload

import numpy as np

from pymerge.common.arrays import Array
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.methods.core.deltas import Spanned
from pymerge.methods.core.tall import Basis, Matrix, Tall, basis_of

# A product whose norm is below this share of its factors' is rounding: its columns cancel each other.
_ROUNDING = 1e-14


class Factors(NamedTuple):
    """tau_t = B A of a linear weight, d_out x d_in; of rank 0 where the task did not touch it.

    Both are float64, or float32 where that holds them.
    """

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

    @property
    def double(self) -> Factors:
        """It in float64."""
        return Factors(self.B.astype(np.float64, copy=False), self.A.astype(np.float64, copy=False))


class Tasks(Sequence[Factors]):
    """The factors of all tasks of a weight in two tall matrices.

    Args:
        left: [B_1 .. B_T], d_out x R.
        right: [A_1^T .. A_T^T], d_in x R.
        ranks: of each task.
    """

    def __init__(self, left: Matrix, right: Matrix, ranks: Sequence[int]) -> None:
        self.left = left
        self.right = right
        self.ranks = tuple(ranks)
        self.places = [slice(*ends) for ends in pairwise(accumulate(ranks, initial=0))]

    @classmethod
    def of(cls, tasks: Sequence[Factors]) -> Tasks:
        """Tasks as they are, or joined."""
        if isinstance(tasks, Tasks):
            return tasks
        left = np.concatenate([task.B for task in tasks], axis=1)
        right = np.concatenate([task.A.T for task in tasks], axis=1)
        return cls(left, np.ascontiguousarray(right), [len(task.A) for task in tasks])

    @classmethod
    def empty(cls, shape: tuple[int, int], ranks: Sequence[int], double: bool) -> Tasks:
        """Room for tasks of these ranks, in pages of its own, until they are `put`."""
        sides = [(rows, sum(ranks)) for rows in shape]
        code = "F64" if double else "F32"
        left, right = (Array.mapped(math.prod(side) * ITEM_SIZES[code]).at(0, code, side).numpy() for side in sides)
        return cls(left, right, ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @overload
    def __getitem__(self, index: int) -> Factors: ...
    @overload
    def __getitem__(self, index: slice) -> list[Factors]: ...
    def __getitem__(self, index: int | slice) -> Factors | list[Factors]:
        if isinstance(index, slice):
            return [self[t] for t in range(len(self))[index]]
        place = self.places[index]
        return Factors(self.left[:, place], self.right[:, place].T)

    def put(self, task: int, B: Matrix, A: Matrix) -> None:
        """Fill in the factors of a task."""
        self.left[:, self.places[task]] = B
        self.right[:, self.places[task]] = A.T

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.left), len(self.right)

    def columns(self, kept: Sequence[int]) -> list[int]:
        """Numbers of the columns of some tasks."""
        return [column for t in kept for column in range(len(self.left.T))[self.places[t]]]


@dataclass(frozen=True, eq=False)
class RowSpace:
    """tau_t = B_t L_t Q^T of the tasks that are not zero, with orthonormal columns Q, d_in x q, q <= d_in.

    Q spans the rows of all A_t, those of zero tasks too, and of ones, if these were asked for: 1 = U Q^T.
    """

    tasks: Tasks
    kept: tuple[int, ...]  # numbers of the tasks that are not zero
    squares: tuple[Matrix, ...]  # of each of them B_t^T B_t
    L: tuple[Matrix, ...]  # of each of them r_t x q
    basis: Basis
    norms: tuple[float, ...]  # n_t, squared Frobenius norms, above 0
    U: Matrix  # 1 x q, or 0 x q

    def __len__(self) -> int:
        """Number of tasks that are not zero."""
        return len(self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.tasks.shape

    @cached_property
    def B(self) -> Tall:
        """[B_1 .. B_T] of the tasks that are not zero, d_out x R."""
        if len(self.kept) == len(self.tasks):
            return Tall(self.tasks.left)
        return Tall(self.tasks.left[:, self.tasks.columns(self.kept)])

    def squared(self, squares: Sequence[Matrix]) -> Iterator[Matrix]:
        """L_t^T S_t L_t of each task, q x q, one after the other."""
        return (L.T @ square @ L for L, square in zip(self.L, squares, strict=True))

    def product(self, P: Tall, core: Matrix) -> Spanned:
        """X = P core Q^T."""
        return Spanned(P, core @ self.basis.X.T, self.basis.tall)

    def only(self, kept: Sequence[int]) -> RowSpace:
        """The same space with some of its tasks."""
        if len(kept) == len(self):
            return self
        squares, L = (tuple(part[t] for t in kept) for part in (self.squares, self.L))
        numbers, norms = tuple(self.kept[t] for t in kept), tuple(self.norms[t] for t in kept)
        return replace(self, kept=numbers, squares=squares, L=L, norms=norms)


def row_space(tasks: Sequence[Factors], squares: Sequence[Matrix] | None = None, *, ones: bool = False) -> RowSpace:
    """The space of the rows of all tasks, finite, of one shape; with `ones` it contains a row of these.

    Args:
        squares: B_t^T B_t of each task, where they are known.
    """
    found = Tasks.of(tasks)
    basis = basis_of(Tall(found.right, ones))
    *L, U = split([*found.ranks, int(ones)], basis.R.T, axis=0)
    if squares is None:
        squares = [Tall(found.left[:, place]).gram() for place in found.places]
    norms = [float(((square @ part) * part).sum()) for square, part in zip(squares, L, strict=True)]
    sizes = [float(np.trace(square)) * float((part * part).sum()) for square, part in zip(squares, L, strict=True)]
    kept = [t for t, size in enumerate(sizes) if norms[t] > _ROUNDING**2 * size]
    chosen = tuple(squares[t] for t in kept), tuple(L[t] for t in kept)
    return RowSpace(found, tuple(kept), *chosen, basis, tuple(norms[t] for t in kept), U)


def split(sizes: Sequence[int], M: Matrix, axis: int) -> list[Matrix]:
    """Parts of a matrix, of these sizes along an axis."""
    return np.split(M, np.cumsum(sizes)[:-1], axis=axis)


def total_of(matrices: Iterable[Any]) -> Any:
    """The sum of one or more arrays or tensors, in their order; of one, itself."""
    return reduce(operator.add, matrices)


def plain_sum(tasks: Sequence[Factors], weight: float = 1.0) -> Spanned:
    """X = weight * sum_t tau_t."""
    found = Tasks.of(tasks)
    return Spanned(Tall(found.left), weight * np.eye(sum(found.ranks)), Tall(found.right))
