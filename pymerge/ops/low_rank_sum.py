"""Rows of a weight with a product of two small factors added: adapters, and what solvers make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor, dtype_of
from pymerge.common.dtypes import ITEM_SIZES, is_float
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix, check_out, check_out_dtype, is_contiguous, output

if TYPE_CHECKING:
    from torch import Tensor


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
    right: ArrayLike  # R, R x columns, of the same dtype, contiguous
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
        check_matrix("low_rank_sum", "R", self.right, (rank, self.base.shape[1]))
        check_out_dtype("low_rank_sum", self.out_dtype)
        result = self.out_dtype or dtype_of(self.base if self.out is None else self.out)
        check_out("low_rank_sum", self.out, self.base, result, [self.base, self.left, self.right])
        wide = "F64" in (dtype_of(self.base), result)
        codes = {dtype_of(self.left), dtype_of(self.right)}
        if not is_float(dtype_of(self.base)) or len(codes) > 1 or not codes <= ({"F64"} if wide else {"F32", "F64"}):
            raise ArgumentError(
                f"low_rank_sum: a base of {dtype_of(self.base)} and factors of {', '.join(sorted(codes))}; give both "
                f"in float64{'' if wide else ', or both in float32'}"
            )
        if not (is_contiguous(self.left) and is_contiguous(self.right)):
            raise ArgumentError("low_rank_sum: the factors must be contiguous")

    def reference(self) -> Tensor:
        """By one product."""
        base, left, right = as_tensor(self.base), as_tensor(self.left), as_tensor(self.right)
        product = left @ right
        if self.scale != 1.0:
            product *= self.scale
        code = self.out_dtype or (None if self.out is None else dtype_of(self.out))
        return output(self.out, base, code).copy_(product.add_(base))

    @staticmethod
    def scratch(shape: tuple[int, int], rank: int, code: str) -> int:
        """Bytes beside inputs and result: of native code, both factors once more, the reference the product."""
        rows, columns = shape
        return ITEM_SIZES[code] * (rows + columns + 64) * rank
