"""`random_mask` in one pass over the weights; ranks by buckets of a row's magnitudes."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, numbers
from pymerge.backends.native._masks import mask_addresses, no_masks
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops._op import numel_of
from pymerge.ops.random_mask import RandomMask


def compute(op: RandomMask, threads: int) -> TaskMasks:
    """The masks."""
    from pymerge import _C

    masks = no_masks(len(op.experts), op.base)
    base, inputs = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    _C.random_mask(
        mask_addresses(masks, op.norms),
        flat(base),
        [flat(expert) for expert in inputs],
        numbers(op.lowest),
        numbers(op.highest),
        list(op.keys),
        op.first,
        numel_of(base) // max(1, op.columns),
        op.columns,
        threads,
    )
    return masks
