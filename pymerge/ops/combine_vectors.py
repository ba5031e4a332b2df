"""Weighted sums with weights of their own for each row or column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import Axis, vector_shape
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of
from pymerge.ops._blocks import matrix_blocks
from pymerge.ops._op import Op, check_out, check_out_dtype, check_vectors, compute_dtype, output
from pymerge.ops.task_dots import check_axis

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class CombineVectors(Op[ArrayLike]):
    """sum_t w_gt W_t for each vector g, or W_0 + sum_t w_gt (W_t - W_0) when a base is given.

    Accumulates in float32 (float64 if any input is) in the order of `tensors`, and rounds once at the end.
    """

    summary = "weighted sums with weights for each row or column"

    base: ArrayLike | None  # W_0, any shape, or None for a plain weighted sum
    tensors: Sequence[ArrayLike]  # T tensors W_t of the same shape; each may have its own floating dtype
    weights: NDArray[Any]  # [G, T] float64, G the number of vectors along `axis` as in `task_dots`
    axis: Axis
    out_dtype: str | None = None  # code of the result's dtype; default: the base's, or the first tensor's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the inputs' shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless the tensors agree and there is a weight for each tensor and vector."""
        op = "combine_vectors"
        like = check_vectors(op, self.base, self.tensors)
        check_axis(op, self.axis)
        rows, columns = vector_shape(like.shape, self.axis)
        expected = (columns if self.axis == "columns" else rows, len(self.tensors))
        if tuple(self.weights.shape) != expected:
            raise ArgumentError(f"{op}: weights have shape {tuple(self.weights.shape)}, expected {expected}")
        check_out_dtype(op, self.out_dtype)
        inputs = self.tensors if self.base is None else [self.base, *self.tensors]
        check_out(op, self.out, like, self.out_dtype, inputs)

    def reference(self) -> Tensor:
        """Sum block by block."""
        import torch

        like = as_tensor(self.like)
        dtype = compute_dtype(self.base, *self.tensors)
        rows, columns = vector_shape(like.shape, self.axis)
        flat = [as_tensor(tensor).reshape(rows, columns) for tensor in self.tensors]
        origin = None if self.base is None else like.reshape(rows, columns)
        out = output(self.out, like, self.out_dtype)
        merged, by_columns = out.view(rows, columns), self.axis == "columns"
        factors = torch.from_numpy(self.weights).to(device=like.device, dtype=dtype).T
        factors = factors[:, None, :] if by_columns else factors[:, :, None]
        for place in matrix_blocks(rows, columns, block_of(like)):
            start = torch.zeros_like(merged[place], dtype=dtype) if origin is None else origin[place].to(dtype)
            total = start.clone()
            here = (slice(None), *((slice(None), place[1]) if by_columns else (place[0],)))
            for each, factor in zip(flat, factors[here], strict=True):
                total.addcmul_(each[place].to(dtype) - start, factor)
            merged[place] = total
        return out
