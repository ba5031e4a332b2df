"""Order of the work: the pieces of a plan, pass by pass, one by one or in batches."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from pymerge.planner.budget import Budget
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Memory, Step

# Pieces that may be in memory before (read ahead) and after (to be written) the one that is computed.
READ_AHEAD = 2
WRITE_BEHIND = 2
# Pieces of other tensors between two passes of one, if there are so many: the first pass is all done then.
BETWEEN_PASSES = 8
READ_THREADS = 4
# Elements of the layers that are computed as one batch, by device; 0 for none. One small layer does not fill a GPU; the
# cores of a CPU it does. Untimed: a guess at what a GPU takes.
BATCH_ELEMENTS = {"cpu": 0, "cuda": 16 * 2**20}


@dataclass(frozen=True)
class Slot:
    """One piece in its turn."""

    step: Step
    piece: Piece
    memory: Memory
    number: int = 0  # of the pass over all pieces of the step

    @property
    def merges(self) -> bool:
        """Whether this gives a part of the result; the passes before the last one do not."""
        return self.number == self.step.passes - 1

    @property
    def reads(self) -> bool:
        """Whether the inputs are read; those of a step that are held are, in the first pass alone."""
        return self.number == 0 or not self.step.held

    @property
    def reads_last(self) -> bool:
        """Whether they are not read again."""
        return self.step.held or self.merges

    @property
    def starts_step(self) -> bool:
        """Whether no piece of the step comes before this one."""
        return self.number == 0 and self.piece is self.step.pieces[0]

    @property
    def ends_step(self) -> bool:
        """Whether no piece of the step comes after this one."""
        return self.merges and self.piece is self.step.pieces[-1]


@dataclass(frozen=True)
class Batch:
    """Pieces that are read, computed and written together: one, or some of a shard with the same action and shape."""

    slots: tuple[Slot, ...]

    @cached_property
    def memory(self) -> Memory:
        """Bytes that all pieces need together."""
        memories = [slot.memory for slot in self.slots]
        return Memory(*(sum(getattr(memory, part) for memory in memories) for part in ("inputs", "scratch", "output")))

    @property
    def name(self) -> str:
        """Name of the first tensor, and how many pieces are with it, for people."""
        more = len(self.slots) - 1
        return self.slots[0].step.name + (f" and {more} more of its shape" if more else "")


def slots(steps: Iterable[Step]) -> Iterator[Slot]:
    """All pieces in the order of the plan, those of a tensor pass after pass."""
    return (slot for step in steps for number in range(step.passes) for slot in _pass(step, number, 0))


def alternating(steps: Sequence[Step], limit: int) -> list[Slot]:
    """All pieces, passes of a tensor alternating with those of its neighbours, as far as all of it fits `limit` bytes.

    A pass starts when all is known of the one before. If other work lies between, nobody waits for the last piece.
    """
    tensors = _tensors(steps)
    known: dict[int, int] = {}  # bytes that are held for each tensor, between its passes
    found: list[Slot] = []
    for number, index in _passes(tensors):
        together = tensors[index]
        if len(together) > 1:  # rows of one tensor, which are written in their order
            found += (replace(slot, memory=_with_scratch(slot.memory, sum(known.values()))) for slot in slots(together))
            continue
        (step,) = together
        others = sum(nbytes for other, nbytes in known.items() if other != index)
        found += _pass(step, number, others)
        if number < step.passes - 1:
            known[index] = step.known_bytes
        else:
            known.pop(index, None)
    return found if all(slot.memory.peak <= limit for slot in found) else list(slots(steps))


def _passes(tensors: Sequence[Sequence[Step]]) -> Iterator[tuple[int, int]]:
    """All passes, as (number, tensor), in their order: the next one of the first tensor whose last one is far enough
    behind, or else the first one of another tensor."""
    begun: dict[int, tuple[int, int]] = {}  # tensors between passes: number of the next one, pieces when the last ended
    pieces_so_far, unbegun = 0, iter(range(len(tensors)))
    while True:
        index = next((index for index, (_, end) in begun.items() if pieces_so_far - end >= BETWEEN_PASSES), None)
        if index is None:
            index = next(unbegun, None)
        if index is None:
            index = next(iter(begun), None)
        if index is None:
            return
        number, _ = begun.pop(index, (0, 0))
        yield number, index
        pieces_so_far += sum(len(step.pieces) for step in tensors[index])
        if len(tensors[index]) == 1 and number < tensors[index][0].passes - 1:
            begun[index] = number + 1, pieces_so_far


def _tensors(steps: Iterable[Step]) -> list[list[Step]]:
    """The steps of each tensor."""
    return [list(together) for _, together in groupby(steps, key=lambda step: step.name)]


def _pass(step: Step, number: int, others: int) -> Iterator[Slot]:
    """The pieces of one pass, with so many bytes held for other tensors."""
    last = number == step.passes - 1
    for piece in step.pieces:
        memory = _with_scratch(step.memory(piece), others)
        if step.held:
            inputs = memory.inputs if number == 0 else 0
            memory = replace(memory, inputs=inputs, scratch=memory.scratch + step.held_bytes - inputs)
        yield Slot(step, piece, memory if last else replace(memory, output=0), number)


def _with_scratch(memory: Memory, nbytes: int) -> Memory:
    return replace(memory, scratch=memory.scratch + nbytes)


def batches(steps: Sequence[Step], budget: Budget) -> list[Batch]:
    """All pieces, alternating, except that a batch stands at the place of its first piece.

    So the pieces of one tensor stay in order, and which ones are together does not depend on other shards.
    """
    found: list[list[Slot]] = []
    filling: dict[Hashable, list[Slot]] = {}
    for slot in alternating(steps, budget.tensors):
        most = _most_layers(slot, budget)
        together = filling.get(_kind(slot)) if most > 1 else None
        if together is not None and len(together) < most:
            together.append(slot)
            continue
        found.append([slot])
        if most > 1:
            filling[_kind(slot)] = found[-1]
    return [Batch(tuple(together)) for together in found]


def _most_layers(slot: Slot, budget: Budget) -> int:
    """Number of pieces like this one in a batch; less than 2 where it is computed alone. As with row ranges, the next
    two are to be read and the last two to be written meanwhile."""
    if not slot.step.action.batched:
        return 1
    memory = slot.memory
    layers = BATCH_ELEMENTS[budget.device] // max(1, math.prod(slot.piece.shape))
    return min(layers, budget.tensors // max(1, room(memory)))


def _kind(slot: Slot) -> Hashable:
    """Key that is equal for pieces that may be one batch."""
    step = slot.step
    dtypes = (step.dtype, *(entry.dtype for entry in step.inputs))
    return (step.file, step.action, step.layer.in_axis, step.layer.stacked, slot.piece.shape, dtypes, step.reads_base)


def room(memory: Memory) -> int:
    """Bytes that a piece takes with the next ones being read and the last ones being written."""
    return memory.peak + READ_AHEAD * memory.inputs + WRITE_BEHIND * memory.output
