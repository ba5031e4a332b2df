"""`magnitude_counts` in one pass over the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.backends.native._arguments import contiguous, flat, numpy_address, optional
from pymerge.ops.magnitude_counts import MagnitudeCounts


def compute(op: MagnitudeCounts, threads: int) -> NDArray[Any]:
    """The counts."""
    from pymerge import _C

    counts = np.zeros((len(op.experts), 1 << op.bits), np.int64)
    base = None if op.base is None else contiguous(op.base)
    inputs = [contiguous(expert) for expert in op.experts]
    experts, prefixes = [flat(expert) for expert in inputs], list(op.prefixes)
    digit = op.shift, op.bits, op.in_double
    _C.magnitude_counts(numpy_address(counts), optional(base), experts, prefixes, *digit, threads)
    return counts
