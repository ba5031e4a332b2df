"""`combine` in one pass over the inputs; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, numbers, optional, output
from pymerge.common.arrays import ArrayLike
from pymerge.ops.combine import Combine


def compute(op: Combine, threads: int) -> ArrayLike:
    """The weighted sum; of arrays without PyTorch."""
    from pymerge import _C

    out = output(op.out, op.like, op.out_dtype)
    base = None if op.base is None else contiguous(op.base)
    inputs = [contiguous(tensor) for tensor in op.tensors]
    weights = numbers(op.weights)
    _C.combine(flat(out), optional(base), [flat(tensor) for tensor in inputs], weights, op.divisor, threads)
    return out


def convert(values: ArrayLike, out: ArrayLike) -> None:
    """Write contiguous elements to `out` in its dtype, rounded once: what a sum of nothing adds to them."""
    from pymerge import _C

    _C.combine(flat(out), flat(values), [], [], 1.0, 1)
