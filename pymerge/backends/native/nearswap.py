"""`nearswap` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike
from pymerge.ops.nearswap import LEAST_DIFFERENCE, Nearswap


def compute(op: Nearswap, threads: int) -> ArrayLike:
    """The moved elements."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype)
    base, expert = contiguous(op.base), contiguous(op.expert)
    _C.nearswap(flat(out), flat(base), flat(expert), op.t, LEAST_DIFFERENCE, threads)
    return out
