"""What is in memory when: how far reading may run ahead of computing, and results may wait to be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pymerge.methods.reduce import Reducing
from pymerge.planner import pieces
from pymerge.planner.jobs import READ_AHEAD, WRITE_BEHIND, Batch, Slot
from pymerge.planner.steps import Memory

# More pieces are read ahead, or wait, as long as they are small together, so that norms and biases between large layers
# do not stop the reading.
SMALL_BYTES = 16 * 2**20
_MOST_PIECES = 16
MOST_WAITING = 30


class Window:
    """Which pieces may be read now: in order, as far ahead as every one of them can still be computed in its turn.

    Piece i is computed with the inputs of all pieces read ahead in memory. So a further one is admitted if, for each
    piece that waits before it, its peak and all inputs behind it stay within the limit. Outputs that wait to be
    written are not counted here: the pipeline waits for the writer before it reads or computes what does not fit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Memory] = deque()
        self.inputs = 0  # bytes of all admitted pieces

    def __len__(self) -> int:
        return len(self._waiting)

    def admits(self, memory: Memory) -> bool:
        """Whether this piece, the next one, may be read."""
        if not self._waiting:
            return True
        ahead = self.inputs - self._waiting[0].inputs + memory.inputs
        if len(self) > _MOST_PIECES or (len(self) > READ_AHEAD and ahead > SMALL_BYTES):
            return False
        behind = memory.inputs
        for waiting in reversed(self._waiting):
            if waiting.peak + behind > self._limit:
                return False
            behind += waiting.inputs
        return True

    def push(self, memory: Memory) -> None:
        """The piece is being read."""
        self._waiting.append(memory)
        self.inputs += memory.inputs

    def pop(self) -> None:
        """The first piece has been computed and its inputs are free."""
        self.inputs -= self._waiting.popleft().inputs


def known_bytes(slot: Slot) -> int:
    """What is in memory beside the piece itself: of its tensor from earlier passes, and of others."""
    own = pieces.cost(slot.step.layer, slot.step.action, slot.piece, len(slot.step.experts)).workspace
    return slot.memory.scratch - own if slot.step.in_ranges else 0


def waiting(queue: Iterable[Slot]) -> tuple[int, int]:
    """How many pieces may wait on a CPU, where files are merged as they are read, and what the largest of them takes.

    They wait to be written or, where a pass only looks, taken note of. A disk now and then stops for a moment; if there
    are passes that only look, they are done meanwhile.
    """
    count, nbytes = WRITE_BEHIND, 0
    for slot in queue:
        action, seen = slot.step.action, 0
        if isinstance(action, Reducing) and slot.step.in_ranges:
            count = MOST_WAITING
            seen = 0 if slot.merges else action.plain_bytes(slot.piece.shape, len(slot.step.experts))
        nbytes = max(nbytes, slot.memory.output + seen)
    return count, nbytes


def may_wait(outputs: Sequence[int]) -> bool:
    """Whether outputs of these sizes may wait for the writer together."""
    return len(outputs) <= WRITE_BEHIND or (len(outputs) <= _MOST_PIECES and sum(outputs) <= SMALL_BYTES)


@dataclass(frozen=True)
class Forecast:
    """What a run will hold at most, and how far it reads ahead."""

    peak: int  # bytes
    depth: int  # batches (on a CPU, pieces) read ahead of every one but the last ones


def forecast(queue: Iterable[Batch], limit: int) -> Forecast:
    """Follow the pipeline's rules through all batches, with a writer that is as late as it may be."""
    window = Window(limit)
    rest = iter(queue)
    following = next(rest, None)
    line: deque[Memory] = deque()
    outputs: deque[int] = deque()
    peak, depth = 0, None
    while line or following:
        while following and window.admits(following.memory):
            window.push(following.memory)
            line.append(following.memory)
            following = next(rest, None)
        memory = line.popleft()
        late = sum(outputs)
        peak = max(peak, min(limit, memory.peak + window.inputs - memory.inputs + late))
        if following or depth is None:
            depth = len(window) - 1 if depth is None else min(depth, len(window) - 1)
        window.pop()
        if memory.output:
            outputs.append(memory.output)
        while not may_wait(outputs):
            outputs.popleft()
    return Forecast(peak, depth or 0)
