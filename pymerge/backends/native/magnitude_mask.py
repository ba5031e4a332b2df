"""`magnitude_mask` in one pass over the weights."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, optional
from pymerge.backends.native._masks import mask_addresses, no_masks, threshold_addresses
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.magnitude_mask import MagnitudeMask


def compute(op: MagnitudeMask, threads: int) -> TaskMasks:
    """The masks."""
    from pymerge import _C

    masks = no_masks(len(op.experts), op.like)
    base = None if op.base is None else contiguous(op.base)
    inputs = [contiguous(expert) for expert in op.experts]
    _C.magnitude_mask(
        mask_addresses(masks),
        optional(base),
        [flat(expert) for expert in inputs],
        threshold_addresses(op.kept),
        threshold_addresses(op.dropped),
        threads,
    )
    return masks
