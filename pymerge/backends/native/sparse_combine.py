"""`sparse_combine` block by block in the first-level cache; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import address, contiguous, flat, numbers, output
from pymerge.backends.native._masks import threshold_addresses
from pymerge.common.arrays import ArrayLike
from pymerge.ops.sparse_combine import SparseCombine


def compute(op: SparseCombine, threads: int) -> ArrayLike:
    """The merged tensor; thresholds are compared where the weights are merged, without masks in memory."""
    from pymerge import _C

    out = output(op.out, op.base, op.out_dtype)
    base, inputs = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    bits = None if op.bits is None else contiguous(op.bits)
    _C.sparse_combine(
        flat(out),
        flat(base),
        [flat(expert) for expert in inputs],
        0 if bits is None else address(bits),
        threshold_addresses(op.kept),
        threshold_addresses(op.dropped),
        op.sizes,
        numbers(op.weights),
        op.elect,
        op.normalize,
        float(op.scale),
        threads,
    )
    return out
