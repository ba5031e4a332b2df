"""Importance of the elements of a model to Arcee Fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, numel_of, shape_of
from pymerge.ops.row_divergence import row_blocks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Importance(Op[ArrayLike]):
    """|W_1 - W_0| times the divergence of the row, in the shape of the base, float32 (float64 if an input is).

    Differences in that dtype, products in float64. Source: Arcee Fusion in mergekit.
    """

    summary = "difference of each element times the divergence of its row"

    base: ArrayLike  # W_0, any shape, floating point; its last axis is a row
    expert: ArrayLike  # W_1 like it; may have its own dtype
    divergence: NDArray[np.float64]  # [rows], of `row_divergence`

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree, dtypes are floating point and there is a divergence of each row."""
        check_divergence("importance", self.base, self.expert, self.divergence)

    def reference(self) -> Tensor:
        """Compute a few rows at a time."""
        import torch

        base, expert = as_tensor(self.base), as_tensor(self.expert)
        dtype = compute_dtype(base, expert)
        scores = torch.empty(base.shape, dtype=dtype, device=base.device)
        if not base.numel():
            return scores
        divergence = torch.from_numpy(self.divergence).to(base.device)
        rows = scores.view(len(divergence), -1)
        near, far = base.reshape(rows.shape), expert.reshape(rows.shape)
        for here in row_blocks(rows.shape[0], rows.shape[1], block_of(rows)):
            rows[here] = importance(near[here], far[here], divergence[here], dtype)
        return scores


def importance(near: Tensor, far: Tensor, divergence: Tensor, dtype: torch.dtype) -> Tensor:
    """Importances of the elements of some rows, in `dtype`."""
    delta = far.to(dtype) - near.to(dtype)
    return (delta * divergence[:, None]).abs_().to(dtype)  # not even 0 has a sign


def check_divergence(op: str, base: ArrayLike, expert: ArrayLike, divergence: NDArray[np.float64]) -> None:
    """Raise ArgumentError unless tensors agree, dtypes are floating point and there is a divergence of each row."""
    check_task_tensors(op, base, [expert])
    columns = base.shape[-1] if len(base.shape) else 1
    if divergence.ndim != 1 or len(divergence) * columns != numel_of(base):
        raise ArgumentError(
            f"{op}: divergences of shape {divergence.shape} for rows of {shape_of(base)}; take them from "
            "row_divergence on the same tensors"
        )
