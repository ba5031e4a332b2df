"""`sce_spread` in one pass; bit for bit the reference's result."""

from __future__ import annotations

from pymerge.backends.native._arguments import contiguous, flat, output
from pymerge.common.arrays import ArrayLike, compute_code
from pymerge.ops.sce_spread import SceSpread


def compute(op: SceSpread, threads: int) -> ArrayLike:
    """Variances."""
    from pymerge import _C

    spread = output(None, op.base, compute_code(op.base, *op.experts))
    base, experts = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    _C.sce_spread(flat(spread), flat(base), [flat(expert) for expert in experts], threads)
    return spread
