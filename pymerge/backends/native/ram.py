"""`ram` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, numbers, output
from pymerge.common.arrays import ArrayLike
from pymerge.ops.ram import Ram


def compute(op: Ram, threads: int) -> ArrayLike:
    """W_0 and the mean of what is active."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype)
    base, experts = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    factors = None if op.factors is None else numbers(op.factors)
    _C.ram(flat(out), flat(base), [flat(expert) for expert in experts], op.epsilon, factors, threads)
    return out
