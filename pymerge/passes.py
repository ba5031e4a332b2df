"""Tensors that are reduced before they are merged, piece by piece: what is known of one from one piece to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pymerge import pieces
from pymerge.checkpoint import TORCH_DTYPES
from pymerge.methods.average import element_count
from pymerge.methods.base import OpRunner
from pymerge.methods.reducing import Reducing, Reduction
from pymerge.methods.tensor_parts import TensorPart
from pymerge.schedule import Slot


class Passes:
    """Carries out pieces one at a time, those of a step in the order of the plan."""

    def __init__(self, run_op: OpRunner) -> None:
        self._run_op = run_op
        self._reduction: Reduction | None = None

    def run(self, slot: Slot, base: Tensor, experts: Sequence[Tensor]) -> Tensor | None:
        """The merged piece, in the output's dtype; None in the passes before the one that merges."""
        step, piece, dtype = slot.step, slot.piece, TORCH_DTYPES[slot.step.dtype]
        if not step.in_ranges:
            return pieces.run(step.action, step.layer, self._run_op, base, experts, dtype)
        assert isinstance(step.action, Reducing)
        if slot.starts_step:
            self._reduction = step.action.reduction(step.shape, len(experts))
        assert self._reduction is not None
        first = piece.start * element_count(step.shape[1:])
        part = TensorPart(self._run_op, base, experts, dtype, first, piece.start)
        if slot.merges:
            merged: Tensor = self._reduction.merge(part)
            return merged
        self._reduction.take(first, self._reduction.look(part))
        if piece is step.pieces[-1]:
            self._reduction.settle()
        return None

    def done(self) -> None:
        """A step is over: what was known of its tensor is not needed any more."""
        self._reduction = None
