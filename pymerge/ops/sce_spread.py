"""How much models differ, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops._blocks import sum_in_order, task_blocks
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype


def check(base: Tensor, experts: Sequence[Tensor]) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("sce_spread", base, experts)


def reference(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return the variance of the tau_t at each element, in the shape of the base.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.

    In float32 (float64 if an input is), divided by T, in the order of `experts`. Source: the select step of SCE,
    FuseChat-3.0, arXiv 2408.07990.
    """
    dtype = compute_dtype(base, *experts)
    spread = torch.empty(base.numel(), dtype=dtype, device=base.device)
    for here, _, taus in task_blocks(base, experts, dtype):
        mean = sum_in_order(taus).div_(len(experts))
        spread[here] = sum_in_order((taus - mean).square_()).div_(len(experts))
    return spread.view(base.shape)


OP = FunctionOp("sce_spread", check, reference, "variance of the task vectors at each element")
