"""`ram_counts` in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on
from pymerge.common.arrays import as_tensor
from pymerge.ops.ram_counts import RamCounts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def compute(op: RamCounts, threads: int) -> NDArray[np.int64]:
    """Lone and shared elements of each task."""
    from pymerge.kernels import ram as kernel

    base, experts = as_tensor(op.base).contiguous(), [as_tensor(expert).contiguous() for expert in op.experts]
    with on(base.device):
        counts: Tensor = kernel.counts(base, experts, op.epsilon)
    return counts.cpu().numpy()
