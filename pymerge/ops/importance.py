"""How much the elements of a model matter to Arcee Fusion."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype
from pymerge.ops.row_divergence import row_blocks


def check(base: Tensor, expert: Tensor, divergence: Tensor) -> None:
    """Raise ArgumentError unless tensors agree, dtypes are floating point and there is a divergence of each row."""
    check_task_tensors("importance", base, [expert])
    columns = base.shape[-1] if base.ndim else 1
    if divergence.ndim != 1 or len(divergence) * columns != base.numel():
        raise ArgumentError(
            f"importance: divergences of shape {tuple(divergence.shape)} for rows of {tuple(base.shape)}; take them "
            "from row_divergence on the same tensors"
        )


def reference(base: Tensor, expert: Tensor, divergence: Tensor) -> Tensor:
    """Return |W_1 - W_0| times the divergence of the row, in the shape of the base.

    Args:
        base: W_0, any shape, floating point; its last axis is a row.
        expert: W_1 like it.
        divergence: [rows] float64, of `row_divergence`.

    Differences in float32 (float64 if an input is), as is the result; products in float64. Source: Arcee Fusion in
    mergekit.
    """
    dtype = compute_dtype(base, expert)
    scores = torch.empty(base.shape, dtype=dtype, device=base.device)
    if not base.numel():
        return scores
    rows = scores.view(len(divergence), -1)
    near, far = base.reshape(rows.shape), expert.reshape(rows.shape)
    for here in row_blocks(*rows.shape):
        delta = far[here].to(dtype) - near[here].to(dtype)
        rows[here] = (delta * divergence[here, None]).abs_()  # not even 0 has a sign
    return scores


OP = FunctionOp("importance", check, reference, "difference of each element times the divergence of its row")
