"""`arcee_fusion` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike
from pymerge.ops.arcee_fusion import ArceeFusion
from pymerge.ops.row_divergence import shape_of_rows


def compute(op: ArceeFusion, threads: int) -> ArrayLike:
    """Elements of one model or the other."""
    import numpy as np

    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype)
    base, expert = contiguous(op.base), contiguous(op.expert)
    divergence = np.ascontiguousarray(op.divergence, np.float64)
    shape = shape_of_rows(op.base)
    _C.arcee_fusion(flat(out), flat(base), flat(expert), divergence.ctypes.data, op.least, *shape, threads)
    return out
