"""`trim_threshold` in a pass over the weights or two, without a copy of the task vectors."""

from __future__ import annotations

import numpy as np

from pymerge.backends.native._arguments import contiguous, flat, numpy_address, optional
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold


def compute(op: TrimThreshold, threads: int) -> Thresholds:
    """The thresholds."""
    from pymerge import _C

    thresholds, searched = op.known()
    base = None if op.base is None else contiguous(op.base)
    inputs = [contiguous(op.experts[task]) for task in searched]
    keys, ends = np.empty(len(searched), np.int64), np.empty(len(searched), np.int64)
    counts = [op.counts[task] for task in searched]
    _C.trim_threshold(
        numpy_address(keys), numpy_address(ends), optional(base), [flat(expert) for expert in inputs], counts, threads
    )
    thresholds.keys[searched], thresholds.ends[searched] = keys, ends
    return thresholds
