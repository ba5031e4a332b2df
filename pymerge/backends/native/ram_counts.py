"""`ram_counts` in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import contiguous, flat
from pymerge.ops.ram_counts import RamCounts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def compute(op: RamCounts, threads: int) -> NDArray[np.int64]:
    """Lone and shared elements of each task."""
    import numpy as np

    from pymerge import _C

    counts = np.empty((len(op.experts), 2), np.int64)
    base, experts = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    _C.ram_counts(counts.ctypes.data, flat(base), [flat(expert) for expert in experts], op.epsilon, threads)
    return counts
