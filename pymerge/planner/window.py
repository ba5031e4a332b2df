"""Window: what may be in memory when; how far work runs ahead of its turn, and results wait to be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pymerge.methods.actions import Combine
from pymerge.planner.jobs import READ_AHEAD, WRITE_BEHIND, WRITE_THREADS, Batch, Job

# More pieces are read ahead, or wait, as long as they are small together, so that norms and biases between large layers
# do not stop the reading.
SMALL_BYTES = 16 * 2**20
_MOST_PIECES = 16
# Jobs of a pool that may wait for their turn, where some are of passes that only map: a disk now and then stops for a
# moment, and they are done meanwhile.
MOST_WAITING = 30
# Pieces that are merged before the turn of those that threads work on. The writer holds one more. Each lies in memory
# of its own, and memory that has not been used before costs more than merging into it.
DONE_AHEAD = 1


@dataclass(frozen=True)
class PoolShare:
    """Memory and threads of a pool, beside the jobs that `Window` holds against each other.

    `threads` jobs are worked on at a time, in `working` bytes together; 0 threads: each job in its turn, alone.
    `ahead` further ones may wait for their turn, of those that merge DONE_AHEAD.
    """

    threads: int
    working: int
    ahead: int


def pool_share(queue: Sequence[Batch], limit: int, threads: int) -> PoolShare:
    """The share of the pool in a queue: as many threads as the machine has, if their memory fits the limit.

    Where other steps are computed in their turn, what the largest needs is left to it.
    """
    pooled = [batch.jobs[0] for batch in queue if batch.pooled]
    if not pooled:
        return PoolShare(0, 0, 0)
    one = max(working_bytes(job) + job.footprint.output for job in pooled)
    others = max((batch.footprint.peak for batch in queue if not batch.pooled), default=0)
    known = max(known_bytes(job) for job in pooled)
    fitting = max(0, limit - max(others, known)) // max(1, one)
    count = min(threads, fitting) if others else max(1, min(threads, fitting))
    waits = MOST_WAITING if any(job.reduces for job in pooled) else DONE_AHEAD
    return PoolShare(count, count * max(working_bytes(job) for job in pooled), waits)


def working_bytes(job: Job) -> int:
    """Bytes that one pooled job needs while it is worked on: its inputs, and what is computed beside the output."""
    step = job.step
    if isinstance(step.action, Combine):
        return step.footprint(job.piece).inputs
    return step.footprint(job.piece).inputs + step.scratch(job.piece)


def known_bytes(job: Job) -> int:
    """Bytes in memory beside the piece itself: of its tensor from earlier passes, of others, of its file."""
    known = job.reduces or job.step.gathered is not None
    return job.footprint.scratch - job.step.scratch(job.piece) if known else 0


def waiting_bytes(job: Job) -> int:
    """Bytes of what a pooled job has made, while it waits for its turn: a result, or a contribution to a pass."""
    if job.merges:
        return job.footprint.output
    return job.step.scratch(job.piece)


class Waiting(NamedTuple):
    """A batch that has been admitted."""

    pooled: bool
    held: int  # bytes from its admission on
    peak: int  # in its turn
    known: int = 0  # of the peak, what is in memory before it is admitted
    merges: bool = False  # of a pooled one: whether it makes a part of the output


class Window:
    """Rule for starting jobs: in order, as far ahead as every one of them can still have its turn.

    A job that is not pooled is computed in its turn, with the inputs of all jobs read ahead in memory. So a further one
    is admitted if, for each job that waits before it, its peak and all that is held behind it stay within the limit. A
    pooled job is worked on as soon as a thread is free; what the threads work in is set apart (`share`), and it holds
    what it made until its turn. Outputs that wait to be written are not counted here: the executor waits for the writer
    before it starts what does not fit.
    """

    def __init__(self, limit: int, share: PoolShare) -> None:
        self._limit = limit - share.working
        self._share = share
        self._waiting: deque[Waiting] = deque()
        self._pooled = self._merging = 0  # of those, how many
        self.held = 0  # bytes of all admitted jobs
        self._asked: tuple[Batch, Waiting] | None = None  # for the last time, as several ask one after the other

    def __len__(self) -> int:
        return len(self._waiting)

    def admits(self, batch: Batch) -> bool:
        """Whether this batch, the next one, may be started."""
        if not self._waiting:
            return True
        new = self.entry(batch)
        if new.pooled:
            if self._pooled >= self._share.threads + self._share.ahead:
                return False
            if new.merges and self._merging >= self._share.threads + DONE_AHEAD:
                return False
        else:
            others = len(self) - self._pooled
            ahead = self.held - self._waiting[0].held + new.held
            if others > _MOST_PIECES or (others > READ_AHEAD and ahead > SMALL_BYTES):
                return False
        behind = new.held
        for waiting in reversed(self._waiting):
            if waiting.peak + behind > self._limit:
                return False
            behind += waiting.held
        return True

    def push(self, batch: Batch) -> None:
        """The batch is started."""
        new = self.entry(batch)
        self._waiting.append(new)
        self._pooled += new.pooled
        self._merging += new.merges
        self.held += new.held

    def pop(self) -> None:
        """The first batch has had its turn; what it held is free, or with the writer."""
        first = self._waiting.popleft()
        self._pooled -= first.pooled
        self._merging -= first.merges
        self.held -= first.held

    @property
    def first(self) -> Waiting | None:
        """The batch whose turn comes next."""
        return self._waiting[0] if self._waiting else None

    def entry(self, batch: Batch) -> Waiting:
        """Bytes that a batch holds from its admission on, and in its turn."""
        if self._asked is None or self._asked[0] is not batch:
            self._asked = batch, self._entry(batch)
        return self._asked[1]

    def _entry(self, batch: Batch) -> Waiting:
        footprint = batch.footprint
        if not batch.pooled:
            return Waiting(False, footprint.inputs, footprint.peak)
        job = batch.jobs[0]
        known = known_bytes(job)
        if not self._share.threads:
            return Waiting(True, 0, known + working_bytes(job) + footprint.output, known, job.merges)
        held = waiting_bytes(job)
        return Waiting(True, held, known + held, known, job.merges)


def may_wait(outputs: Sequence[tuple[bool, int]]) -> bool:
    """Whether these outputs, of native code or not and of so many bytes, may wait for the writer together.

    Of native code as many as are written at once, however small they are: each lies in memory for the largest.
    """
    sizes = [nbytes for native, nbytes in outputs if not native]
    if len(outputs) - len(sizes) > WRITE_THREADS:
        return False
    return len(sizes) <= WRITE_BEHIND or (len(sizes) <= _MOST_PIECES and sum(sizes) <= SMALL_BYTES)


@dataclass(frozen=True)
class Forecast:
    """Forecast of what a run holds at most, and of how far it works ahead."""

    peak: int  # bytes
    depth: int  # batches started before every one but the last ones


def forecast(queue: Sequence[Batch], limit: int, threads: int) -> Forecast:
    """Follow the executor's rules through all batches, with a writer that is as late as it may be."""
    share = pool_share(queue, limit, threads)
    window = Window(limit, share)
    rest = iter(queue)
    following = next(rest, None)
    line: deque[Batch] = deque()
    outputs: deque[tuple[bool, int]] = deque()
    peak, depth = 0, None
    while line or following:
        while following and window.admits(following):
            window.push(following)
            line.append(following)
            following = next(rest, None)
        batch = line.popleft()
        entry = window.entry(batch)
        late = sum(nbytes for _, nbytes in outputs)
        peak = max(peak, min(limit, share.working + entry.peak + window.held - entry.held + late))
        if following or depth is None:
            depth = len(window) - 1 if depth is None else min(depth, len(window) - 1)
        window.pop()
        if output := _handed_on(batch, line[0] if line else following):
            outputs.append((batch.jobs[0].step.worker == "native", output))
        while not may_wait(outputs):
            outputs.popleft()
    return Forecast(peak, depth or 0)


def _handed_on(batch: Batch, following: Batch | None) -> int:
    """Bytes that go to the writer after the turn of a batch: of a file that is gathered all at once, with its last."""
    step = batch.jobs[0].step
    if step.gathered is None:
        return batch.footprint.output
    ends_file = following is None or following.jobs[0].step.file != step.file
    return step.gathered + batch.footprint.output if ends_file else 0


def most_output(queue: Iterable[Batch]) -> int:
    """Bytes of the largest output of a native job; rooms for outputs have this size, so that any fits any."""
    return max((batch.footprint.output for batch in queue if batch.jobs[0].step.worker == "native"), default=0)
