"""The erase step of SCE: the weighted mean of the task vectors that have the majority's sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._bitmask import check_bits
from pymerge.ops._blocks import block_bytes, sum_in_order, task_blocks
from pymerge.ops._op import (
    Op,
    check_length,
    check_out,
    check_out_dtype,
    check_task_tensors,
    compute_dtype,
    numel_of,
    output,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sce(Op[ArrayLike]):
    """W_0 + sum_t w_t keep_t tau_t / sum_t w_t keep_t.

    keep_t: tau_t is not 0 and has the sign of sum_t tau_t (plus for 0). Where no task is kept the base stays. In
    float32 (float64 if an input is), in the order of `experts`, rounded once at the end. Source: FuseChat-3.0, arXiv
    2408.07990; mergekit.
    """

    summary = "weighted mean of the task vectors of the majority's sign, over selected elements"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype
    weights: Sequence[float]  # T numbers w_t
    # [1, 8 ceil(numel / 64)] uint8, see `pymerge.ops._bitmask`: elements where this is not set keep W_0; default: all
    # are merged.
    bits: ArrayLike | None = None
    least: float = 0.0  # lower limit of the divisor
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the base's shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless tensors, weights and mask fit together and dtypes are floating point."""
        check_task_tensors("sce", self.base, self.experts)
        check_length("sce", "weights", self.weights, len(self.experts))
        if self.bits is not None:
            check_bits("sce", self.bits, 1, numel_of(self.base))
        check_out_dtype("sce", self.out_dtype)
        check_out("sce", self.out, self.base, self.out_dtype, [self.base, *self.experts])

    def reference(self) -> Tensor:
        """Merge block by block."""
        import torch

        base = as_tensor(self.base)
        dtype = compute_dtype(base, *self.experts)
        merged = output(self.out, base, self.out_dtype)
        flat = merged.view(-1)
        mask = None if self.bits is None else as_tensor(self.bits)[0]
        for here, origin, taus in task_blocks(base, self.experts, dtype, mask):
            positive = sum_in_order(taus) >= 0.0
            total, divisor = torch.zeros_like(origin), torch.zeros_like(origin)
            for tau, weight in zip(taus, self.weights, strict=True):
                kept = torch.where(positive, tau > 0.0, tau < 0.0).to(dtype).mul_(weight)
                total.add_(tau * kept)  # NaN stays, whatever its weight
                divisor.add_(kept)
            divisor = divisor.clamp(min=self.least)
            flat[here] = origin + total / torch.where(divisor == 0.0, 1.0, divisor)
        return merged

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result."""
        return 0 if native else block_bytes(shape, experts)
