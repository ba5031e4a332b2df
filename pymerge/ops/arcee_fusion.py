"""Arcee Fusion: takes over from a model the elements that matter most, by a threshold of their importance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_task_tensors, compute_dtype, one_thread
from pymerge.ops.selection import kth_smallest

BLOCK = 2**18  # elements of rows that are worked on at once in float64
_SMALL = 1e-8  # added to probabilities


def check(base: Tensor, expert: Tensor, out_dtype: torch.dtype | None = None) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("arcee_fusion", base, [expert])
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"arcee_fusion: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(base: Tensor, expert: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return W_1 where its importance reaches the threshold, else W_0.

    Args:
        base: W_0, any shape, floating point; its last axis is a row.
        expert: W_1 like it.
        out_dtype: dtype of the result; default: the base's.

    Importance: |W_1 - W_0| sum_row p ln(p / q) with p = softmax(row of W_1) + 1e-8, q that of W_0. Threshold:
    Q_1/2 + 1.5 (Q_3/4 - Q_1/4), quantile Q_f the value at floor(f (n - 1)) of all n sorted. Divergences run in float64,
    since float32 has few digits of them; importances are float32 (float64 if an input is). Source: mergekit.
    """
    dtype = compute_dtype(base, expert)
    columns = base.shape[-1] if base.ndim else 1
    near, far = (tensor.reshape(-1, columns) if tensor.numel() else tensor for tensor in (base, expert))
    merged = torch.empty(near.shape, dtype=out_dtype or base.dtype, device=base.device)
    if not base.numel():
        return merged
    scores = torch.empty(near.shape, dtype=dtype, device=base.device)
    with one_thread():
        for rows in row_blocks(*near.shape):
            p, q = (torch.softmax(tensor[rows].to(torch.float64), dim=-1).add_(_SMALL) for tensor in (far, near))
            divergence = q.div_(p).log_().mul_(p).sum(-1, keepdim=True).neg_().clamp_(min=0.0)
            scores[rows] = ((far[rows].to(dtype) - near[rows].to(dtype)) * divergence).abs_()  # not even 0 has a sign
    least = threshold(scores.view(-1))
    for rows in row_blocks(*near.shape):
        # Not less rather than at least: NaN takes over, and is in the result.
        chosen = torch.where(scores[rows] < least, near[rows].to(dtype), far[rows].to(dtype))
        merged[rows] = chosen
    return merged.reshape(base.shape)


def threshold(scores: Tensor) -> float:
    """Q_1/2 + 1.5 (Q_3/4 - Q_1/4) in the dtype of the scores."""
    last = len(scores) - 1
    low, middle, high = (
        torch.tensor(kth_smallest(scores, last * quarter // 4), dtype=scores.dtype) for quarter in (1, 2, 3)
    )
    return float(middle + 1.5 * (high - low))


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of whole rows."""
    height = max(1, BLOCK // max(columns, 1))
    return (slice(start, start + height) for start in range(0, rows, height))


OP = Op("arcee_fusion", check, reference, "elements of a model whose importance reaches a threshold")
