"""Tensors that are reduced before they are merged, read from files to plain memory: `passes`, on several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pymerge.backends.combine_files import DTYPES, is_finite
from pymerge.checkpoint import ITEM_SIZES, Reader
from pymerge.memory import Room
from pymerge.methods.average import element_count
from pymerge.methods.reducing import Reducing, Reduction
from pymerge.schedule import Slot
from pymerge.steps import Step

_LINE = 64  # bytes of a cache line


def can_take(step: Step) -> bool:
    """Whether a step's tensors can be reduced and merged without PyTorch."""
    action = step.action
    if not isinstance(action, Reducing) or not action.plain or not step.reads_base:
        return False
    dtypes = {step.dtype, *(entry.dtype for entry in step.inputs)}
    return dtypes <= DTYPES.keys() - {"F64"} and all(entry.contiguous for entry in step.inputs)


class RawPasses:
    """Reductions of steps, the pieces of a pass in any order, on any threads."""

    def __init__(self, reader: Reader, used: Callable[[str], None]) -> None:
        self._reader = reader
        self._used = used
        self._reductions: dict[str, Reduction] = {}  # by the step's name
        self._memory = threading.local()

    def starts(self, slot: Slot) -> None:
        """A piece will be worked on; by the thread that calls `take`."""
        if slot.starts_step:
            assert isinstance(slot.step.action, Reducing)
            reduction = slot.step.action.reduction(slot.step.shape, len(slot.step.experts))
            self._reductions[slot.step.name] = reduction

    def work(self, slot: Slot, out: int, *, check_inputs: bool) -> tuple[Any, int, bool]:
        """Read a piece and look at it, or merge it to address `out`.

        Returns what was seen, nanoseconds of reading, and whether all that was looked at is finite. By any thread.
        """
        from pymerge.raw_parts import Raw, RawPart

        step, piece = slot.step, slot.piece
        numel = element_count(piece.shape)
        room, at, tensors = self._room(slot), 0, []
        began = time.perf_counter_ns()
        for entry in step.inputs:
            nbytes = numel * ITEM_SIZES[entry.dtype]
            self._reader.read_bytes_into(entry, room.view[at : at + nbytes], piece.start, piece.stop)
            tensors.append(Raw(room.address + at, DTYPES[entry.dtype], numel))
            at += -(-nbytes // _LINE) * _LINE
        reading = time.perf_counter_ns() - began
        base, *experts = tensors
        first = piece.start * element_count(step.shape[1:])
        part = RawPart(base, experts, Raw(out, DTYPES[step.dtype], numel), piece.shape, self._used, first, piece.start)
        reduction = self._reductions[step.name]
        # NaN in one range shows in the result of others.
        finite = not (check_inputs and step.in_ranges and slot.number == 0) or all(
            is_finite(tensor.address, entry.dtype, numel) for tensor, entry in zip(tensors, step.inputs, strict=True)
        )
        if not slot.merges:
            return reduction.look(part) if finite else None, reading, finite
        if not step.in_ranges:
            reduction.look_at_all(part, [part])
        reduction.merge(part)
        return None, reading, finite and is_finite(out, step.dtype, numel)

    def take(self, slot: Slot, seen: Any) -> None:
        """What was seen of a piece, in the order of the pieces."""
        step = slot.step
        if slot.ends_step:
            del self._reductions[step.name]
        if slot.merges:
            return
        reduction = self._reductions[step.name]
        reduction.take(slot.piece.start * element_count(step.shape[1:]), seen)
        if slot.piece is step.pieces[-1]:
            reduction.settle()

    def _room(self, slot: Slot) -> Room:
        """Memory for the inputs of a piece, of this thread."""
        numel = element_count(slot.piece.shape)
        nbytes = sum(numel * ITEM_SIZES[entry.dtype] + _LINE for entry in slot.step.inputs)
        room: Room | None = getattr(self._memory, "room", None)
        if room is None or room.view.nbytes < nbytes:
            self._memory.room = None
            self._memory.room = room = Room(nbytes)
        return room
