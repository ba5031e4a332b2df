"""`importance` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike, compute_code
from pymerge.ops.importance import Importance
from pymerge.ops.row_divergence import shape_of_rows


def compute(op: Importance, threads: int) -> ArrayLike:
    """A score for each element."""
    import numpy as np

    from pymerge import _C

    scores = output(None, op.base, compute_code(op.base, op.expert))
    base, expert = contiguous(op.base), contiguous(op.expert)
    divergence = np.ascontiguousarray(op.divergence, np.float64)
    _C.importance(flat(scores), flat(base), flat(expert), divergence.ctypes.data, *shape_of_rows(op.base), threads)
    return scores
