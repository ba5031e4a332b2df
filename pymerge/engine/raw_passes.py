"""Tensors that are reduced before they are merged, read from files to plain memory: `passes`, on several threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from pymerge.backends.native.combine_files import is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.arrays import Array
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.dtypes import NATIVE as DTYPES
from pymerge.methods.reduce import Reducing, Reduction
from pymerge.planner.jobs import Slot
from pymerge.planner.steps import Step

_LINE = 64  # bytes of a cache line


def can_take(step: Step) -> bool:
    """Whether a step's tensors can be reduced and merged without PyTorch."""
    action = step.action
    if not isinstance(action, Reducing) or not action.plain or not step.reads_base:
        return False
    dtypes = {step.dtype, *(entry.dtype for entry in step.inputs)}
    return dtypes <= DTYPES.keys() - {"F64"} and all(entry.contiguous for entry in step.inputs)


def working_bytes(slot: Slot) -> int:
    """Memory for the inputs of a piece, and what is computed from them beside the output."""
    assert isinstance(slot.step.action, Reducing)
    return _input_bytes(slot) + slot.step.action.plain_bytes(slot.piece.shape, len(slot.step.experts))


class RawPasses:
    """Reductions of steps, the pieces of a pass in any order, on any threads."""

    def __init__(self, reader: Reader, used: Callable[[str], None]) -> None:
        self._reader = reader
        self._used = used
        self._reductions: dict[int, Reduction] = {}  # of steps that have begun
        self._idle: list[Array] = []  # memory for inputs that nobody uses
        self._held: dict[tuple[int, int], Array] = {}  # by step and first row
        self._lock = threading.Lock()

    def starts(self, slot: Slot) -> None:
        """A piece will be worked on; by the thread that calls `take`."""
        if slot.starts_step:
            assert isinstance(slot.step.action, Reducing)
            reduction = slot.step.action.reduction(slot.step.shape, len(slot.step.experts))
            self._reductions[id(slot.step)] = reduction

    def work(self, slot: Slot, out: int, *, check_inputs: bool) -> tuple[Any, int, bool]:
        """Read a piece and look at it, or merge it to address `out`.

        Returns what was seen, nanoseconds of reading, and whether all that was looked at is finite. By any thread.
        """
        room = self._take_room(slot)
        try:
            seen, reading, finite = self._work(slot, room, out, check_inputs=check_inputs)
        except BaseException:
            self._return_room(slot, room)
            raise
        self._give_room(slot, room)
        return seen, reading, finite

    def _work(self, slot: Slot, room: Array, out: int, *, check_inputs: bool) -> tuple[Any, int, bool]:
        from pymerge.engine.raw_parts import Raw, RawPart

        step, piece = slot.step, slot.piece
        numel = math.prod(piece.shape)
        at, tensors = 0, []
        began = time.perf_counter_ns()
        for entry in step.inputs:
            nbytes = numel * ITEM_SIZES[entry.dtype]
            if slot.reads:
                self._reader.read_bytes_into(entry, room.bytes[at : at + nbytes], piece.start, piece.stop)
            tensors.append(Raw(room.address + at, DTYPES[entry.dtype], numel))
            at += -(-nbytes // _LINE) * _LINE
        reading = time.perf_counter_ns() - began
        base, *experts = tensors
        first = piece.start * math.prod(step.shape[1:])
        part = RawPart(base, experts, Raw(out, DTYPES[step.dtype], numel), piece.shape, self._used, first, piece.start)
        reduction = self._reductions[id(step)]
        seen = None
        if slot.merges:
            if not step.in_ranges:
                reduction.look_at_all(part, [part])
            reduction.merge(part)
            finite = is_finite(out, step.dtype, numel)
        else:
            seen = reduction.look(part)
            # NaN in one range shows in the result of others.
            finite = (
                not (check_inputs and slot.number == 0)
                or reduction.finite(seen)
                or all(is_finite(t.address, entry.dtype, numel) for t, entry in zip(tensors, step.inputs, strict=True))
            )
        return seen, reading, finite

    def free(self) -> None:
        """Give back memory for inputs that nobody uses."""
        with self._lock:
            self._idle.clear()

    def take(self, slot: Slot, seen: Any) -> None:
        """What was seen of a piece, in the order of the pieces."""
        step = slot.step
        if slot.ends_step:
            del self._reductions[id(step)]
        if slot.merges:
            return
        reduction = self._reductions[id(step)]
        reduction.take(slot.piece.start * math.prod(step.shape[1:]), seen)
        if slot.piece is step.pieces[-1]:
            reduction.settle()

    def _take_room(self, slot: Slot) -> Array:
        """Memory for the inputs of a piece; with them in it, if they are held."""
        nbytes = _input_bytes(slot)
        with self._lock:
            if not slot.reads:
                return self._held.pop((id(slot.step), slot.piece.start))
            for index, room in enumerate(self._idle):
                if room.nbytes >= nbytes:
                    return self._idle.pop(index)
            if self._idle:  # too small: sooner or later all are as large as the largest pieces
                self._idle.pop()
        return Array.mapped(nbytes)

    def _return_room(self, slot: Slot, room: Array) -> None:
        """As it was before the piece was worked on."""
        with self._lock:
            if slot.reads:
                self._idle.append(room)
            else:
                self._held[id(slot.step), slot.piece.start] = room

    def _give_room(self, slot: Slot, room: Array) -> None:
        with self._lock:
            if slot.step.held and not slot.merges:
                self._held[id(slot.step), slot.piece.start] = room
            else:
                self._idle.append(room)


def _input_bytes(slot: Slot) -> int:
    numel = math.prod(slot.piece.shape)
    return sum(numel * ITEM_SIZES[entry.dtype] + _LINE for entry in slot.step.inputs)
