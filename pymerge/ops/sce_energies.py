"""Energies of task vectors over selected elements: the calculate step of SCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._bitmask import check_bits
from pymerge.ops._blocks import task_blocks
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, numel_of, one_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SceEnergies(Op["NDArray[np.float64]"]):
    """The sum of tau_t^2 of each task, [T] float64.

    Deltas in float32 (float64 if an input is), squares and sums in float64. Source: the calculate step of SCE,
    FuseChat-3.0, arXiv 2408.07990.
    """

    summary = "sum of squares of each task vector, over selected elements"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype
    # [1, 8 ceil(numel / 64)] uint8, see `pymerge.ops._bitmask`: which elements count; default: all.
    bits: ArrayLike | None = None

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree, dtypes are floating point and the mask fits."""
        check_task_tensors("sce_energies", self.base, self.experts)
        if self.bits is not None:
            check_bits("sce_energies", self.bits, 1, numel_of(self.base))

    def reference(self) -> NDArray[np.float64]:
        """Sum up block by block."""
        import torch

        base = as_tensor(self.base)
        dtype = compute_dtype(base, *self.experts)
        mask = None if self.bits is None else as_tensor(self.bits)[0]
        energies = torch.zeros(len(self.experts), dtype=torch.float64, device=base.device)
        with one_thread():
            for _, _, taus in task_blocks(base, self.experts, dtype, mask):
                energies += taus.to(torch.float64).square_().sum(-1)
        return energies.cpu().numpy()
