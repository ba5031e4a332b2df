"""Arcee Fusion: takes over from a model the elements whose importance reaches a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops import importance
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import compute_dtype
from pymerge.ops.row_divergence import row_blocks


def check(base: Tensor, expert: Tensor, divergence: Tensor, least: float, out_dtype: torch.dtype | None = None) -> None:
    """Raise ArgumentError unless tensors agree, dtypes are floating point and there is a divergence of each row."""
    importance.check(base, expert, divergence)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"arcee_fusion: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor, expert: Tensor, divergence: Tensor, least: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return W_1 where its importance is at least `least`, else W_0.

    Args:
        base: W_0, any shape, floating point; its last axis is a row.
        expert: W_1 like it.
        divergence: [rows] float64, of `row_divergence`; see `importance`.
        least: the threshold.
        out_dtype: dtype of the result; default: the base's.

    Source: mergekit.
    """
    dtype = compute_dtype(base, expert)
    merged = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    if not base.numel():
        return merged
    rows = merged.view(len(divergence), -1)
    near, far = base.reshape(rows.shape), expert.reshape(rows.shape)
    for here in row_blocks(*rows.shape):
        scores = importance.reference(near[here], far[here], divergence[here])
        # Not less rather than at least: NaN takes over, and is in the result.
        rows[here] = torch.where(scores < least, near[here].to(dtype), far[here].to(dtype))
    return merged


OP = FunctionOp("arcee_fusion", check, reference, "elements of a model whose importance reaches a threshold")
