"""How many elements one task vector alone touches, and how many it shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops._blocks import task_blocks
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype


def check(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("ram_counts", base, experts)


def reference(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """Return [u_t, s_t] of each task, [T, 2] int64: elements where tau_t alone is active, and where another is too.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        epsilon: tau_t is active where |tau_t| > epsilon, or NaN.

    In float32 (float64 if an input is). Source: arXiv 2601.13572.
    """
    counts = torch.zeros(len(experts), 2, dtype=torch.int64, device=base.device)
    for _, _, taus in task_blocks(base, experts, compute_dtype(base, *experts)):
        active = ~(taus.abs() <= epsilon)
        count = active.sum(0)
        counts[:, 0] += (active & (count == 1)).sum(-1)
        counts[:, 1] += (active & (count > 1)).sum(-1)
    return counts


OP = FunctionOp("ram_counts", check, reference, "elements that each task vector alone touches, and those it shares")
