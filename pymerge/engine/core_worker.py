"""Core worker: weights whose task vectors are products of factors, solved from these and added to the base's rows."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pymerge.checkpoint.finite import is_finite
from pymerge.common.dtypes import torch_dtype, upcast
from pymerge.engine.buffers import Buffers
from pymerge.engine.core_solver import CoreSolver
from pymerge.engine.memory import Heap
from pymerge.engine.worker import Context, Made, Sink, failed, raise_nonfinite
from pymerge.ops._op import one_thread
from pymerge.planner.jobs import Batch, Job

# Memory that stays idle between rows of different sizes.
_MOST_IDLE = 2**25


class CoreWorker:
    """Solves each weight once, by the first thread that needs it, and adds the result to the base row range by row
    range.

    Each job is computed on one thread: then no result depends on how many there are.
    """

    def __init__(self, context: Context, threads: int, limit: int) -> None:
        self._run = context.run
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._allow_nonfinite = context.allow_nonfinite
        self._solver = CoreSolver(context)
        self._keeps_cache = context.keeps_cache
        self._buffers = Buffers(min(limit // 16, _MOST_IDLE))  # for rows; of the leading thread
        self._heap = Heap(limit)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, threads), "pymerge-core", torch.set_num_threads, (1,))

    def start(self, job: Job) -> Future[Made]:
        """Have a thread work on a job."""
        self._reader.announce(job.step.base, job.piece.start, job.piece.stop)
        try:
            rooms = self._rooms(job)
        except MemoryError as error:
            return failed(error)
        return self._pool.submit(self._work, job, rooms)

    def finish(self, batch: Batch, started: list[Future[Made]]) -> list[Made]:
        """Wait for a job, or work on it now."""
        (job,) = batch.jobs
        if started:
            made = started[0].result()
        else:
            with one_thread():
                made = self._work(job, self._rooms(job))
        started.clear()  # futures keep their results
        if job.ends_step:
            self._solver.forget(job.step)
        self._buffers.give(made.mapped)
        return [made._replace(mapped=None)]

    def store(self, job: Job, merged: Tensor, sink: Sink) -> None:
        """Give merged rows to the sink."""
        sink.write(job.step.name, merged)

    def reuse(self, merged: Tensor) -> None:
        """Nobody uses the memory of merged rows any more."""
        self._buffers.give(merged)

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn."""
        self._heap.freed(batch.footprint.peak)

    def free(self) -> None:
        """Give back memory that no job is using; what was solved is solved again."""
        self._solver.clear()
        self._buffers.settle(0)
        self._heap.trim()

    def close(self) -> None:
        """End the threads, after the jobs that are worked on."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # what later threads start with

    def _rooms(self, job: Job) -> tuple[Tensor, Tensor]:
        """Memory for rows of the base and for those of the result. Raises MemoryError."""
        codes = job.step.base.dtype, job.step.dtype
        rows, out = (self._buffers.take(job.piece.shape, torch_dtype(code)) for code in codes)
        return rows, out

    def _work(self, job: Job, rooms: tuple[Tensor, Tensor]) -> Made:
        """Add what is solved to rows; `mapped` hands back the memory that these were in."""
        step, piece, began = job.step, job.piece, time.perf_counter_ns()
        rows, out = rooms
        with self._tracer.span("read", step.base.name, step.base.stored_in(piece.start, piece.stop)):
            self._reader.read_into(step.base, rows, piece.start, piece.stop)
            if not self._keeps_cache:
                self._reader.release(step.base, piece.start, piece.stop)
        read = time.perf_counter_ns()
        with self._tracer.span("core", step.name):
            self._solver.merge(step, piece.start, upcast(rows), out)
            if not self._allow_nonfinite and not is_finite(out):
                raise_nonfinite(job, self._reader)
        self._progress.advance(step.bytes_of(piece))
        return Made(out, rows, read - began, time.perf_counter_ns() - read)
