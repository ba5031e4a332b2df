"""Reinforced Agent Merging: the mean of the task vectors that touch an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._blocks import block_bytes, task_blocks
from pymerge.ops._op import (
    Op,
    check_length,
    check_out,
    check_out_dtype,
    check_task_tensors,
    compute_dtype,
    output,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ram(Op[ArrayLike]):
    """W_0 + the mean of the active tau_t at each element; tau_t is active where |tau_t| > epsilon.

    In float32 (float64 if an input is), in the order of `experts`, rounded once at the end. Source: arXiv 2601.13572.
    """

    summary = "mean of the task vectors that touch an element"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype
    epsilon: float  # size up to which an element of tau_t counts as untouched
    factors: Sequence[float] | None = None  # T numbers that tau_t is multiplied by where it alone is active; default: 1
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the base's shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless tensors and factors fit together and dtypes are floating point."""
        check_task_tensors("ram", self.base, self.experts)
        if self.factors is not None:
            check_length("ram", "factors", self.factors, len(self.experts))
        check_out_dtype("ram", self.out_dtype)
        check_out("ram", self.out, self.base, self.out_dtype, [self.base, *self.experts])

    def reference(self) -> Tensor:
        """Merge block by block."""
        import torch

        base = as_tensor(self.base)
        dtype = compute_dtype(base, *self.experts)
        merged = output(self.out, base, self.out_dtype)
        flat = merged.view(-1)
        for here, origin, taus in task_blocks(base, self.experts, dtype):
            active = ~(taus.abs() <= self.epsilon)  # a NaN is active, so that it is in the result
            count = active.sum(0)
            total = torch.zeros_like(origin)
            for index, tau in enumerate(taus):
                total.add_(torch.where(active[index], tau, 0.0))
            total.div_(count.clamp(min=1))
            for index, factor in enumerate(self.factors or ()):
                total = torch.where(active[index] & (count == 1), total * factor, total)
            flat[here] = origin.add_(total)
        return merged

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result."""
        return 0 if native else block_bytes(shape, experts)
