"""Tensors that are reduced before they are merged, piece by piece: what is known of one from one piece to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pymerge import pieces
from pymerge.checkpoint import TORCH_DTYPES
from pymerge.methods.base import OpRunner
from pymerge.methods.reducing import Reducing, Reduction
from pymerge.schedule import Slot


class Passes:
    """Carries out pieces one at a time, those of a step in the order of the plan."""

    def __init__(self, run_op: OpRunner) -> None:
        self._run_op = run_op
        self._reduction: Reduction | None = None

    def run(self, slot: Slot, base: Tensor, experts: Sequence[Tensor]) -> Tensor | None:
        """The merged piece, in the output's dtype; None in the passes before the one that merges."""
        step, dtype = slot.step, TORCH_DTYPES[slot.step.dtype]
        if not step.in_ranges:
            return pieces.run(step.action, step.layer, self._run_op, base, experts, dtype)
        assert isinstance(step.action, Reducing)
        if slot.starts_step:
            self._reduction = step.action.reduction(self._run_op, step.shape, len(experts))
        assert self._reduction is not None
        if slot.merges:
            return self._reduction.merge(slot.piece.start, base, experts, dtype)
        self._reduction.look(slot.piece.start, base, experts)
        if slot.piece is step.pieces[-1]:
            self._reduction.settle()
        return None

    def done(self) -> None:
        """A step is over: what was known of its tensor is not needed any more."""
        self._reduction = None
