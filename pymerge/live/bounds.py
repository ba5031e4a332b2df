"""Bounds of weighted sums: where none can be too large for its dtype, the result need not be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.common.dtypes import torch_dtype
from pymerge.methods.actions import Combine
from pymerge.planner.steps import Step


def peak(tensor: Tensor) -> float:
    """The largest magnitude."""
    return max(abs(float(extreme)) for extreme in torch.aminmax(tensor)) if tensor.numel() else 0.0


def bounded(step: Step, peaks: Sequence[float]) -> bool:
    """Whether no element of a step's result can be too large for its dtype.

    Args:
        peaks: largest magnitudes of the step's inputs, which are finite; none if they are not known.
    """
    action = step.action
    if not isinstance(action, Combine) or not peaks or len(peaks) != len(step.inputs):
        return False
    base, experts = (peaks[0], peaks[1:]) if step.reads_base else (0.0, peaks)
    if len(action.weights) != len(experts):
        return False
    base = base if action.on_base else 0.0
    total = sum(abs(weight) * (one + base) for weight, one in zip(action.weights, experts, strict=True))
    # Sums are made in float32 at least, and a float64 model's in float64.
    largest = 0.5 * torch.finfo(torch_dtype("F32" if step.dtype == "F64" else step.dtype)).max
    return total < largest and total / abs(action.divisor) + base < largest
