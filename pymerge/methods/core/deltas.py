"""Products that solvers find from factors: scale * X of a weight, and rows of it added to the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from pymerge.common.arrays import Array, ArrayLike
from pymerge.methods.core.tall import Matrix, Tall
from pymerge.ops._op import Op
from pymerge.ops.low_rank_sum import LowRankSum, Panels

# Runs an op on the chosen backend.
Run = Callable[[Op[Any]], Any]


class Addend(Protocol):
    """scale * X of a weight in the dtype of its sum with W_0, for rows as they are stored."""

    def add(self, run: Run, base: ArrayLike, first: int, out: ArrayLike) -> None:
        """Write W_0 plus rows from `first` on to `out`, rounded once.

        Args:
            base: these rows of W_0; of at least that dtype's precision or less.
            out: contiguous memory for as many.
        """


class Delta(Protocol):
    """scale * X of a weight, which nobody forms as a whole."""

    def prepared(self, double: bool, in_axis: int) -> Addend:
        """It for rows as they are stored, and a sum in float64 or float32."""


class Rows(NamedTuple):
    """Rows of a product, in the dtype of the sum."""

    left: Tall  # rows x k
    right: Panels  # k x columns

    def add(self, run: Run, base: ArrayLike, first: int, out: ArrayLike) -> None:
        """See `Addend`. Every element has the same bits, whichever rows are asked for."""
        rows = self.left.rows(first, first + base.shape[0], self.left.M.dtype.type)
        run(LowRankSum(base, Array.of(rows), self.right, out=out))


class Product(NamedTuple):
    """X = P K, scales in K."""

    P: Matrix  # d_out x k
    K: Matrix  # k x d_in

    def times(self, scale: float) -> Product:
        """scale * X."""
        return Product(self.P, self.K * scale)

    def product(self) -> Product:
        """It as two matrices."""
        return self

    def whole(self) -> Matrix:
        """X, d_out x d_in."""
        return self.P @ self.K

    def prepared(self, double: bool, in_axis: int) -> Rows:
        """See `Delta`."""
        left, right = (self.K.T, self.P.T) if in_axis == 0 else (self.P, self.K)
        kind, code = (np.float64, "F64") if double else (np.float32, "F32")
        panels = Panels.stacked(len(right), right.shape[1], code, [right])
        return Rows(Tall(np.ascontiguousarray(left, kind)), panels)


@dataclass(frozen=True, eq=False)
class Spanned:
    """X = L core R^T between two tall matrices, as the factors are: none of the same size is formed before it is
    `prepared`."""

    left: Tall  # L, d_out x k
    core: Matrix  # with scales
    right: Tall  # R, d_in x l

    def times(self, scale: float) -> Spanned:
        """scale * X."""
        return replace(self, core=self.core * scale)

    def product(self) -> Product:
        """It as two matrices, of the smaller of the ranks that it can have."""
        rows, columns = self.core.shape
        if rows > columns:
            return Product(self.left.times(self.core), self.right.whole().T)
        return Product(self.left.whole(), self.right.times(self.core.T).T)

    def whole(self) -> Matrix:
        """X, d_out x d_in."""
        return self.product().whole()

    def prepared(self, double: bool, in_axis: int) -> Rows:
        """See `Delta`. The side that has the rows stays as it is."""
        rows, core, columns = self.left, self.core, self.right
        if in_axis == 0:
            rows, core, columns = self.right, self.core.T, self.left
        kind, code = (np.float64, "F64") if double else (np.float32, "F32")
        panels = Panels(rows.width, len(columns), code)
        for place, block in columns.blocks():
            panels.put_columns(place.start, core @ block.T)
        return Rows(Tall(np.ascontiguousarray(rows.M, kind), rows.ones), panels)


def nothing(shape: tuple[int, int]) -> Product:
    """X = 0."""
    return Product(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))
