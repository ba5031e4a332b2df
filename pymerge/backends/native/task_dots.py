"""`task_dots` in one pass over the inputs; columns are turned into rows first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.backends.native._arguments import contiguous, flat, numpy_address, optional
from pymerge.common.arrays import Array, ArrayLike
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.shapes import vector_shape
from pymerge.ops.task_dots import TaskDots


def compute(op: TaskDots, threads: int) -> NDArray[Any]:
    """The inner products; of arrays without PyTorch."""
    from pymerge import _C

    rows, columns = vector_shape(op.like.shape, op.axis)
    vectors, length = (columns, rows) if op.axis == "columns" else (rows, columns)
    dots = np.empty((vectors, len(op.tensors), len(op.tensors)))
    base, tensors = op.base, op.tensors
    if op.axis == "columns":
        base = None if base is None else _turned(base, rows, columns)
        tensors = [_turned(tensor, rows, columns) for tensor in tensors]
    base, inputs = None if base is None else contiguous(base), [contiguous(tensor) for tensor in tensors]
    _C.task_dots(numpy_address(dots), optional(base), [flat(tensor) for tensor in inputs], vectors, length, threads)
    return dots


def _turned(values: ArrayLike, rows: int, columns: int) -> ArrayLike:
    """Columns as rows."""
    if not isinstance(values, Array):
        return values.reshape(rows, columns).T
    items = np.dtype(f"u{ITEM_SIZES[values.dtype]}")  # whatever they are
    turned = np.ascontiguousarray(np.frombuffer(values.bytes, items).reshape(rows, columns).T)
    return Array(turned.ctypes.data, values.dtype, (columns, rows), turned)
