"""Arcee Fusion: takes over from a model the elements whose importance reaches a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._bitmask import block_of
from pymerge.ops._blocks import block_bytes
from pymerge.ops._op import Op, check_out, check_out_dtype, compute_dtype, output
from pymerge.ops.importance import check_divergence, importance
from pymerge.ops.row_divergence import row_blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ArceeFusion(Op[ArrayLike]):
    """W_1 where its importance (op `importance`) is at least `least`, else W_0. Source: mergekit."""

    summary = "elements of a model whose importance reaches a threshold"

    base: ArrayLike  # W_0, any shape, floating point; its last axis is a row
    expert: ArrayLike  # W_1 like it; may have its own dtype
    divergence: NDArray[np.float64]  # [rows], of `row_divergence`
    least: float  # the threshold
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the base's shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree, dtypes are floating point and there is a divergence of each row."""
        check_divergence("arcee_fusion", self.base, self.expert, self.divergence)
        check_out_dtype("arcee_fusion", self.out_dtype)
        check_out("arcee_fusion", self.out, self.base, self.out_dtype, [self.base, self.expert])

    def reference(self) -> Tensor:
        """Choose a few rows at a time."""
        import torch

        base, expert = as_tensor(self.base), as_tensor(self.expert)
        dtype = compute_dtype(base, expert)
        merged = output(self.out, base, self.out_dtype)
        if not base.numel():
            return merged
        divergence = torch.from_numpy(self.divergence).to(base.device)
        rows = merged.view(len(divergence), -1)
        near, far = base.reshape(rows.shape), expert.reshape(rows.shape)
        for here in row_blocks(rows.shape[0], rows.shape[1], block_of(base)):
            scores = importance(near[here], far[here], divergence[here], dtype)
            # Not less rather than at least: NaN takes over, and is in the result.
            rows[here] = torch.where(scores < self.least, near[here].to(dtype), far[here].to(dtype))
        return merged

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result."""
        return 0 if native else block_bytes(shape, 1)
