"""The energy of each task vector, over selected elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops._bitmask import check_bits
from pymerge.ops._blocks import task_blocks
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype, one_thread


def check(base: Tensor, experts: Sequence[Tensor], bits: Tensor | None = None) -> None:
    """Raise ArgumentError unless shapes and devices agree, dtypes are floating point and the mask fits."""
    check_task_tensors("sce_energies", base, experts)
    if bits is not None:
        check_bits("sce_energies", bits, 1, base.numel())


def reference(base: Tensor, experts: Sequence[Tensor], bits: Tensor | None = None) -> Tensor:
    """Return the sum of tau_t^2 of each task, [T] float64.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        bits: [1, 8 ceil(numel / 64)] uint8, see `pymerge.ops._bitmask`: which elements count; default: all.

    Deltas in float32 (float64 if an input is), squares and sums in float64. Source: the calculate step of SCE,
    FuseChat-3.0, arXiv 2408.07990.
    """
    energies = torch.zeros(len(experts), dtype=torch.float64, device=base.device)
    with one_thread():
        for _, _, taus in task_blocks(base, experts, compute_dtype(base, *experts), None if bits is None else bits[0]):
            energies += taus.to(torch.float64).square_().sum(-1)
    return energies


OP = FunctionOp("sce_energies", check, reference, "sum of squares of each task vector, over selected elements")
