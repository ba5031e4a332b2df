"""`combine_vectors` in one pass over the inputs."""

from __future__ import annotations

import numpy as np

from pymerge.backends.native._arguments import contiguous, flat, optional, output
from pymerge.common.arrays import ArrayLike
from pymerge.common.shapes import vector_shape
from pymerge.ops.combine_vectors import CombineVectors


def compute(op: CombineVectors, threads: int) -> ArrayLike:
    """The weighted sums; of arrays without PyTorch."""
    from pymerge import _C

    out = output(op.out, op.like, op.out_dtype)
    base = None if op.base is None else contiguous(op.base)
    inputs = [contiguous(tensor) for tensor in op.tensors]
    weights = np.ascontiguousarray(op.weights.T, np.float64)
    by_columns, shape = op.axis == "columns", vector_shape(op.like.shape, op.axis)
    tensors = [flat(tensor) for tensor in inputs]
    _C.combine_vectors(flat(out), optional(base), tensors, weights.ctypes.data, by_columns, *shape, threads)
    return out
