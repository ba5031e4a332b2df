"""Variance of models, element by element: the select step of SCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._blocks import sum_in_order, task_blocks
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, divide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SceSpread(Op[ArrayLike]):
    """The variance of the tau_t at each element, in the shape of the base, float32 (float64 if an input is).

    Computed in that dtype, divided by T, in the order of `experts`. Source: the select step of SCE, FuseChat-3.0, arXiv
    2408.07990.
    """

    summary = "variance of the task vectors at each element"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
        check_task_tensors("sce_spread", self.base, self.experts)

    def reference(self) -> Tensor:
        """Compute block by block."""
        import torch

        base = as_tensor(self.base)
        dtype = compute_dtype(base, *self.experts)
        spread = torch.empty(base.numel(), dtype=dtype, device=base.device)
        for here, _, taus in task_blocks(base, self.experts, dtype):
            mean = divide(sum_in_order(taus), len(self.experts))
            spread[here] = divide(sum_in_order((taus - mean).square_()), len(self.experts))
        return spread.view(base.shape)
