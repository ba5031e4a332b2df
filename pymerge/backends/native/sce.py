"""`sce` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import address, contiguous, flat, numbers, output
from pymerge.common.arrays import ArrayLike
from pymerge.ops.sce import Sce


def compute(op: Sce, threads: int) -> ArrayLike:
    """W_0 and the weighted mean of what is kept."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype)
    base, experts = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    bits = None if op.bits is None else contiguous(op.bits)
    _C.sce(
        flat(out),
        flat(base),
        [flat(expert) for expert in experts],
        0 if bits is None else address(bits),
        numbers(op.weights),
        op.least,
        threads,
    )
    return out
