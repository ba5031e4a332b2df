"""`low_rank_sum` in tiles that stay in registers and caches, base and rounding in the same pass."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike, dtype_of
from pymerge.ops.low_rank_sum import LowRankSum, panels_of


def compute(op: LowRankSum, threads: int) -> ArrayLike:
    """The sum; of arrays without PyTorch."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype or (None if op.out is None else dtype_of(op.out)))
    base = contiguous(op.base)
    rows, columns = op.base.shape
    panels = panels_of(op.right)
    sides = flat(op.left), flat(panels.values)
    _C.low_rank_sum(flat(out), flat(base), *sides, op.scale, rows, columns, threads)
    return out
