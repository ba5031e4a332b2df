"""Rows of a weight with a product of two small factors added: adapters, and what solvers make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import Array, ArrayLike, as_tensor, dtype_of
from pymerge.common.dtypes import ITEM_SIZES, is_float
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix, check_out, check_out_dtype, is_contiguous, output

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Columns of a panel.
WIDTH = 32


class Panels:
    """A right factor, R x columns, laid out for products once for all rows that it is multiplied with.

    That is WIDTH columns of all its rows, then the next ones, with zeros behind the last: what a tile takes lies
    together. In pages of their own, which go back to the system with it. It is 0 until rows are `put`.

    Args:
        rank: R.
        columns: those of the factor.
        code: F32 or F64.
    """

    __slots__ = ("columns", "values")

    def __init__(self, rank: int, columns: int, code: str) -> None:
        shape = (-(-columns // WIDTH), rank, WIDTH)
        self.columns = columns
        self.values = Array.mapped(math.prod(shape) * ITEM_SIZES[code]).at(0, code, shape)

    @classmethod
    def stacked(cls, rank: int, columns: int, code: str, parts: Iterable[NDArray[Any]]) -> Panels:
        """Matrices of R rows together, one above the other, each used before the next one is asked for."""
        panels, first = cls(rank, columns, code), 0
        for part in parts:
            panels.put(first, part)
            first += len(part)
        return panels

    @property
    def shape(self) -> tuple[int, int]:
        """(R, columns)."""
        return self.values.shape[1], self.columns

    @property
    def dtype(self) -> str:
        """Code of the dtype."""
        return self.values.dtype

    def put(self, first: int, rows: NDArray[Any]) -> None:
        """Fill rows from `first` on with those of a matrix of all columns, rounded to the dtype."""
        _fill(self.values.numpy()[:, first : first + len(rows)], rows)

    def put_columns(self, first: int, columns: NDArray[Any]) -> None:
        """Fill columns from `first` on, a multiple of WIDTH, with those of a matrix of R rows."""
        _fill(self.values.numpy()[first // WIDTH :], columns)

    def matrix(self) -> NDArray[Any]:
        """The factor as a contiguous matrix, copied."""
        rank = self.values.shape[1]
        found: NDArray[Any] = self.values.numpy().transpose(1, 0, 2).reshape(rank, -1)[:, : self.columns].copy()
        return found


def _fill(places: NDArray[Any], rows: NDArray[Any]) -> None:
    """Write a matrix to the first panels, a row of each for its rows."""
    whole, left = divmod(rows.shape[1], WIDTH)
    places[:whole] = rows[:, : whole * WIDTH].reshape(len(rows), whole, WIDTH).transpose(1, 0, 2)
    if left:
        places[whole, :, :left] = rows[:, whole * WIDTH :]


def panels_of(right: ArrayLike | Panels) -> Panels:
    """A right factor in panels: it, if it is, or a copy of one on the CPU."""
    if isinstance(right, Panels):
        return right
    rank, columns = right.shape
    return Panels.stacked(rank, columns, dtype_of(right), [right.numpy()])


@dataclass(frozen=True, eq=False)
class LowRankSum(Op[ArrayLike]):
    """W_0 + s L R, rows x columns.

    The terms of an element are added in their order, in the factors' dtype; the base is added last, and what comes out
    is rounded once. Native code gives an element the same bits in whichever rows it stands.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    summary = "a product of two factors added to rows of a weight"

    base: ArrayLike  # W_0, rows x columns, floating point
    left: ArrayLike  # L, rows x R, float32, or float64 (which a base or a result of float64 takes), contiguous
    right: ArrayLike | Panels  # R, R x columns, of the same dtype, contiguous
    scale: float = 1.0  # s
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    out: ArrayLike | None = None  # contiguous memory for the result

    def check(self) -> None:
        """Raise ArgumentError unless the shapes fit and the factors are of the dtype of the sum."""
        if len(self.base.shape) != 2 or len(self.left.shape) != 2:
            shapes = f"{tuple(self.base.shape)} and L {tuple(self.left.shape)}"
            raise ArgumentError(f"low_rank_sum: the base has shape {shapes}, expected matrices")
        rank = self.left.shape[1]
        check_matrix("low_rank_sum", "L", self.left, (self.base.shape[0], rank))
        if tuple(self.right.shape) != (rank, self.base.shape[1]):
            raise ArgumentError(
                f"low_rank_sum: R has shape {tuple(self.right.shape)}, expected {(rank, self.base.shape[1])}"
            )
        check_out_dtype("low_rank_sum", self.out_dtype)
        result = self.out_dtype or dtype_of(self.base if self.out is None else self.out)
        right = self.right.values if isinstance(self.right, Panels) else self.right
        check_out("low_rank_sum", self.out, self.base, result, [self.base, self.left, right])
        wide = "F64" in (dtype_of(self.base), result)
        codes = {dtype_of(self.left), dtype_of(right)}
        if not is_float(dtype_of(self.base)) or len(codes) > 1 or not codes <= ({"F64"} if wide else {"F32", "F64"}):
            raise ArgumentError(
                f"low_rank_sum: a base of {dtype_of(self.base)} and factors of {', '.join(sorted(codes))}; give both "
                f"in float64{'' if wide else ', or both in float32'}"
            )
        if not (is_contiguous(self.left) and is_contiguous(right)):
            raise ArgumentError("low_rank_sum: the factors must be contiguous")

    def reference(self) -> Tensor:
        """By one product."""
        base, left = as_tensor(self.base), as_tensor(self.left)
        right = Array.of(self.right.matrix()) if isinstance(self.right, Panels) else self.right
        product = left @ as_tensor(right)
        if self.scale != 1.0:
            product *= self.scale
        code = self.out_dtype or (None if self.out is None else dtype_of(self.out))
        return output(self.out, base, code).copy_(product.add_(base))

    @staticmethod
    def scratch(shape: tuple[int, int], rank: int, code: str) -> int:
        """Bytes beside inputs and result: of native code, factors once more, the reference the product."""
        rows, columns = shape
        return ITEM_SIZES[code] * (rows + columns + 64) * rank
