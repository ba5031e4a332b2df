"""`magnitude_place` in one pass over the weights, up to the place."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, optional
from pymerge.ops.magnitude_place import MagnitudePlace


def compute(op: MagnitudePlace, threads: int) -> int:
    """The index."""
    from pymerge import _C

    base = None if op.base is None else contiguous(op.base)
    expert = contiguous(op.expert)
    return _C.magnitude_place(optional(base), flat(expert), op.key, op.count)
