"""How far the rows of two models are from each other, as probability distributions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, one_thread

_SMALL = 1e-8  # added to probabilities


def check(base: Tensor, expert: Tensor) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("row_divergence", base, [expert])


def reference(base: Tensor, expert: Tensor) -> Tensor:
    """Return sum_row p ln(p / q) of each row along the last axis, [rows] float64; 0 where rounding makes it negative.

    Args:
        base: W_0, any shape, floating point; a tensor without axes is one row.
        expert: W_1 like it.

    p = softmax(row of W_1) + 1e-8, q that of W_0, in float64, since float32 has few digits of their difference. Source:
    Arcee Fusion in mergekit.
    """
    columns = base.shape[-1] if base.ndim else 1
    rows = base.numel() // columns if columns else 0
    divergence = torch.empty(rows, dtype=torch.float64, device=base.device)
    near, far = base.reshape(rows, columns), expert.reshape(rows, columns)
    with one_thread():
        for here in row_blocks(rows, columns):
            p, q = (torch.softmax(tensor[here].to(torch.float64), dim=-1).add_(_SMALL) for tensor in (far, near))
            divergence[here] = q.div_(p).log_().mul_(p).sum(-1).neg_().clamp_(min=0.0)
    return divergence


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of whole rows."""
    height = max(1, BLOCK // max(columns, 1))
    return (slice(start, start + height) for start in range(0, rows, height))


OP = FunctionOp("row_divergence", check, reference, "Kullback-Leibler divergence of the softmax of each row")
