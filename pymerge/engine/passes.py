"""Tensors that are reduced before they are merged, piece by piece: what is known of one from one piece to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from pymerge.common.dtypes import torch_dtype
from pymerge.methods.base import OpRunner
from pymerge.methods.reduce import Reducing, Reduction
from pymerge.methods.tensor_parts import TensorPart
from pymerge.planner import pieces
from pymerge.planner.jobs import Slot


class Passes:
    """Carries out pieces one at a time, those of a step in the order of the plan."""

    def __init__(self, run_op: OpRunner) -> None:
        self._run_op = run_op
        self._reductions: dict[int, Reduction] = {}  # of steps that have begun

    def run(self, slot: Slot, base: Tensor, experts: Sequence[Tensor]) -> Tensor | None:
        """The merged piece, in the output's dtype; None in the passes before the one that merges."""
        step, piece, dtype = slot.step, slot.piece, torch_dtype(slot.step.dtype)
        if not step.in_ranges:
            return pieces.run(step.action, step.layer, self._run_op, base, experts, dtype)
        assert isinstance(step.action, Reducing)
        if slot.starts_step:
            self._reductions[id(step)] = step.action.reduction(step.shape, len(experts))
        reduction = self._reductions[id(step)]
        first = piece.start * math.prod(step.shape[1:])
        part = TensorPart(self._run_op, base, experts, dtype, first, piece.start)
        if slot.merges:
            merged: Tensor = reduction.merge(part)
            if slot.ends_step:
                del self._reductions[id(step)]
            return merged
        reduction.take(first, reduction.look(part))
        if piece is step.pieces[-1]:
            reduction.settle()
        return None
