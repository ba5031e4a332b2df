"""Counts of the elements that one task vector alone touches, and of those it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._blocks import task_blocks
from pymerge.ops._op import Op, check_task_tensors, compute_dtype

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RamCounts(Op["NDArray[np.int64]"]):
    """[u_t, s_t] of each task, [T, 2] int64: elements where tau_t alone is active, and where another is too.

    In float32 (float64 if an input is). Source: arXiv 2601.13572.
    """

    summary = "elements that each task vector alone touches, and those it shares"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype
    epsilon: float  # tau_t is active where |tau_t| > epsilon, or NaN

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
        check_task_tensors("ram_counts", self.base, self.experts)

    def reference(self) -> NDArray[np.int64]:
        """Count block by block."""
        import torch

        base = as_tensor(self.base)
        counts = torch.zeros(len(self.experts), 2, dtype=torch.int64, device=base.device)
        for _, _, taus in task_blocks(base, self.experts, compute_dtype(base, *self.experts)):
            active = ~(taus.abs() <= self.epsilon)
            count = active.sum(0)
            counts[:, 0] += (active & (count == 1)).sum(-1)
            counts[:, 1] += (active & (count > 1)).sum(-1)
        return counts.cpu().numpy()
