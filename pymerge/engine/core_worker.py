"""Core worker: weights whose task vectors are products of factors, solved from these and added to the base's rows."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from pymerge.backends import native
from pymerge.backends.native.combine_files import is_finite
from pymerge.checkpoint import finite
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array, rows_of
from pymerge.common.blas import one_blas_thread
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, upcast
from pymerge.engine.core_solver import CoreSolver
from pymerge.engine.memory import Heap
from pymerge.engine.worker import Context, Made, Store, failed, raise_nonfinite
from pymerge.planner.jobs import Batch, Job
from pymerge.planner.pieces import rows_at_once
from pymerge.planner.steps import Step

# Pieces of memory that stay idle between rows of different sizes.
_MOST_IDLE = 4


class CoreWorker:
    """Solves each weight once, by the first thread that needs it, and adds the result to the base a few rows at a time,
    which stay in the cache.

    Each job is computed on one thread, and so is each product of numpy: then no result depends on how many there are.
    """

    def __init__(self, context: Context, threads: int, limit: int, jobs: Sequence[Job]) -> None:
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._allow_nonfinite = context.allow_nonfinite
        self._keeps_cache = context.keeps_cache
        self._solver = CoreSolver(context)
        self._outputs: list[Array] = []  # memory that nobody uses
        self._rooms = threading.local()  # memory of each thread for rows of the base
        self._heap = Heap(limit)
        self._threads = threads
        # Weights in their order, from the first one that is not done.
        self._rest = deque({id(job.step): job.step for job in jobs}.values())
        self._next: Step | None = None  # the last one that was begun ahead, and its solution
        self._solving: Future[None] | None = None
        self._stack = ExitStack()
        self._stack.enter_context(one_blas_thread())
        self._pool = ThreadPoolExecutor(max(1, threads), "pymerge-core")

    def start(self, job: Job) -> Future[Made]:
        """Have a thread work on a job."""
        self._reader.announce(job.step.base, job.piece.start, job.piece.stop)
        try:
            out = self._room(job)
        except MemoryError as error:
            return failed(error)
        future = self._pool.submit(self._work, job, out)
        self._solve_next()
        return future

    def finish(self, batch: Batch, started: list[Future[Made]]) -> list[Made]:
        """Wait for a job, or work on it now."""
        (job,) = batch.jobs
        made = started[0].result() if started else self._work(job, self._room(job))
        started.clear()  # futures keep their results
        if job.ends_step:
            self._solver.forget(job.step)
            self._rest.popleft()
        return [made]

    def store(self, job: Job, merged: Array, store: Store) -> None:
        """Have merged rows written."""
        store.write(job.step.name, merged.bytes)

    def reuse(self, merged: Array) -> None:
        """Nobody uses the memory of merged rows any more."""
        self._outputs.append(merged.whole())

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn."""
        self._heap.freed(batch.footprint.peak)

    def free(self) -> None:
        """Give back memory that no job is using; what was solved is solved again."""
        if self._solving is not None and not self._solving.cancel():
            self._solving.result()
        self._solver.clear()
        self._outputs.clear()
        self._heap.trim()

    def close(self) -> None:
        """End the threads, after the jobs that are worked on."""
        self._pool.shutdown(cancel_futures=True)
        self._stack.close()

    def _solve_next(self) -> None:
        """Have a thread solve the weight after the one that others add to: no more than two are in memory."""
        following = self._rest[1] if len(self._rest) > 1 else None
        if self._threads > 1 and following is not None and following is not self._next:
            self._next = following
            self._solving = self._pool.submit(self._solver.solve_ahead, following)

    def _room(self, job: Job) -> Array:
        """Memory for rows of the result. Raises MemoryError."""
        nbytes = job.step.bytes_made(job.piece)
        for index, idle in enumerate(self._outputs):
            if idle.nbytes == nbytes:
                return self._outputs.pop(index).at(0, job.step.dtype, job.piece.shape)
        if len(self._outputs) > _MOST_IDLE:
            self._outputs.pop(0)
        return Array.mapped(nbytes).at(0, job.step.dtype, job.piece.shape)

    def _work(self, job: Job, out: Array) -> Made:
        """Add what is solved to rows of the base."""
        step, piece, began, reading = job.step, job.piece, time.perf_counter_ns(), 0
        count = rows_at_once(step.role, step.shape)
        with self._tracer.span("core", step.name):
            for first in range(piece.start, piece.stop, count):
                stop = min(first + count, piece.stop)
                started = time.perf_counter_ns()
                rows = self._read(step.base, first, stop)
                reading += time.perf_counter_ns() - started
                room = rows_of(out, first - piece.start, stop - piece.start)
                self._solver.merge(step, first, rows, room)
            if not self._allow_nonfinite and not _is_finite(out):
                raise_nonfinite(job, self._reader)
        if not self._keeps_cache:
            self._reader.release(step.base, piece.start, piece.stop)
        self._progress.advance(step.bytes_of(piece))
        return Made(out, None, reading, time.perf_counter_ns() - began - reading)

    def _read(self, entry: TensorEntry, first: int, stop: int) -> Array:
        """Rows of the base, in memory of this thread's that the next ones will have."""
        if entry.needs_torch or entry.dtype not in NATIVE:
            return Array.of(upcast(self._reader.read(entry, first, stop)))
        shape = (stop - first, *entry.shape[1:])
        nbytes = math.prod(shape) * ITEM_SIZES[entry.dtype]
        room: Array | None = getattr(self._rooms, "base", None)
        if room is None or room.nbytes < nbytes:
            room = self._rooms.base = Array.mapped(nbytes)
        rows = room.at(0, entry.dtype, shape)
        with self._tracer.span("read", entry.name, entry.stored_in(first, stop)):
            self._reader.read_bytes_into(entry, rows.bytes, first, stop)
        return rows


def _is_finite(values: Array) -> bool:
    """Whether no element is NaN or infinite, by native code where there is any."""
    return finite.is_finite(values.tensor()) if native.missing() else is_finite(values)
