"""Inner products of models, or of task vectors: norms and angles of whole tensors, of their rows or columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pymerge.common.shapes import AXES, Axis, vector_shape
from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype, one_thread

# Elements that are upcast to float64 at once: scratch stays small, and sums do not depend on the machine.
BLOCK = 2**18


def check(base: Tensor | None, tensors: Sequence[Tensor], axis: Axis = "whole") -> None:
    """Raise ArgumentError unless shapes and devices agree, all dtypes are floating point and `axis` is known."""
    if base is None and not tensors:
        raise ArgumentError("task_dots: no tensors were given; pass at least one")
    check_task_tensors("task_dots", tensors[0] if base is None else base, tensors)
    if axis not in AXES:
        raise ArgumentError(f"task_dots: axis {axis!r} is unknown; choose one of {', '.join(AXES)}")


def reference(base: Tensor | None, tensors: Sequence[Tensor], axis: Axis = "whole") -> Tensor:
    """Return <v_s, v_t> for every pair of tensors and every vector, [G, T, T] float64 on the tensors' device.

    Args:
        base: W_0, any shape; v_t = W_t - W_0, formed in float32 (float64 if an input is). None: v_t = W_t.
        tensors: T tensors W_t of that shape.
        axis: "whole": one vector, G = 1. "rows": one for each index but the last. "columns": one for each index but
            the first, so that biases are one vector either way.

    Sums run in float64 in an order that the shape decides.
    """
    dtype = compute_dtype(*tensors, *([] if base is None else [base]))
    rows, columns = vector_shape(tensors[0].shape, axis)
    along_rows = axis != "columns"
    dots = torch.zeros(
        rows if along_rows else columns, len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device
    )
    flat = [tensor.reshape(rows, columns) for tensor in tensors]
    origin = None if base is None else base.reshape(rows, columns)
    with one_thread():
        for place in blocks(rows, columns):
            taus = torch.stack([each[place].to(dtype) for each in flat])
            if origin is not None:
                taus -= origin[place].to(dtype)
            taus = taus.to(torch.float64).permute((1, 0, 2) if along_rows else (2, 0, 1))
            dots[place[0] if along_rows else place[1]] += taus @ taus.mT
    return dots


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows and columns that cover a matrix, of at most BLOCK elements each."""
    width = min(max(columns, 1), BLOCK)
    height = max(1, BLOCK // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


OP = FunctionOp("task_dots", check, reference, "inner products of weights or task vectors, one pass over the inputs")
