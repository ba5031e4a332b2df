"""`low_rank_sum` in tiles that stay in registers and caches, base and rounding in the same pass."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike, dtype_of
from pymerge.ops.low_rank_sum import LowRankSum


def compute(op: LowRankSum, threads: int) -> ArrayLike:
    """The sum; of arrays without PyTorch."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype or (None if op.out is None else dtype_of(op.out)))
    base = contiguous(op.base)
    rows, columns = op.base.shape
    sides = flat(op.left), flat(op.right)
    _C.low_rank_sum(flat(out), flat(base), *sides, op.scale, rows, columns, op.left.shape[1], threads)
    return out
