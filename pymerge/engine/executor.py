"""Executor: carries out the jobs of a plan in order, each by the worker of its step, and hands on what they make."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from logging import WARNING
from typing import Any, NamedTuple

from pymerge.backends.runner import Runner
from pymerge.common.events import event
from pymerge.engine.native_worker import NativeWorker
from pymerge.engine.trace import StepLog, Times
from pymerge.engine.worker import Context, Made, Reductions, Sink, Worker, first_line, is_out_of_memory
from pymerge.engine.writing import Writers, Writing
from pymerge.errors import OutOfMemoryError
from pymerge.planner import pieces
from pymerge.planner.jobs import Batch, Job
from pymerge.planner.steps import WorkerName
from pymerge.planner.window import PoolShare, Window, may_wait, most_output, pool_share

_NO_SHARE = PoolShare(0, 0, 0)


class _Begun(NamedTuple):
    """A batch that has been begun, and what is under way for each of its jobs: nothing, if it is worked on later."""

    batch: Batch
    futures: list[Future[Any]]


class Executor:
    """Carries out batches in their order: pools of threads read, compute pooled jobs, and write.

    The thread that calls `run` leads: it makes all decisions, so nothing here is locked, computes jobs that are not
    pooled, and takes what is made in its turn. `Window` says what may be in memory; together with what waits for the
    writer it is never more than the limit. PyTorch is imported if a job needs it.

    Args:
        context: what all workers share; ops run where its runner says.
        sink: takes what is made.
        threads: most pooled jobs that are worked on at a time.
    """

    def __init__(self, context: Context, sink: Sink, threads: int) -> None:
        self._context = context
        self._run = context.run
        self._tracer = context.tracer
        self._progress = context.progress
        self._sink = sink
        self._threads = threads
        self._rest: deque[Batch] = deque()  # not begun
        self._line: deque[_Begun] = deque()  # begun, the next to have its turn first
        self._writes: deque[Writing] = deque()  # under way
        self._workers: dict[WorkerName, Worker] = {}
        self._share, self._limit = _NO_SHARE, 0
        self._window = Window(0, _NO_SHARE)
        self._log = StepLog()
        self._reductions = Reductions()
        self._reading = self._working = self._waited = 0  # nanoseconds: pooled jobs, added up; waiting for them

    def run(self, queue: Sequence[Batch], limit: int) -> None:
        """Work through batches (from pymerge.planner.jobs), with `limit` bytes of tensors in memory at once.

        The first exception of any thread ends it.
        """
        self._rest.extend(queue)
        self._limit = limit
        self._share = pool_share(queue, limit, self._threads)
        self._window = Window(limit, self._share)
        self._workers = self._workers_of(queue)
        self._writers = Writers(self._sink, self._tracer, self._progress, max(1, self._threads))
        try:
            while self._rest or self._line:
                self._begin_ahead()
                begun = self._line.popleft()
                batch = begun.batch
                for job in batch.jobs:
                    self._log.begins(job)
                with self._tracer.span("step", batch.name):
                    self._take_turn(begun)
                for job in batch.jobs:
                    self._log.ends(job)
                self._window.pop()
                self._worker(batch).freed(batch)
            while self._writes:
                self._wait_for_writer()
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers = {}  # with the memory that they have kept
            self._writers.close()

    @property
    def times(self) -> Times:
        """Seconds of the leading thread; waiting for pooled jobs is reading and computing as they do both."""
        seconds, waited = self._tracer.seconds, self._waited / 1e9
        share = self._reading / self._working if self._working else 0.0
        reading = seconds("wait for inputs") + waited * share
        return Times(reading, seconds("compute") + waited * (1.0 - share), seconds("wait for the writer"))

    @property
    def backends(self) -> dict[str, str]:
        """Backend that computed each op."""
        return {op: choice.backend for op, choice in self._run.choices.items()}

    def _workers_of(self, queue: Sequence[Batch]) -> dict[WorkerName, Worker]:
        jobs: dict[WorkerName, list[Job]] = {}
        for batch in queue:
            jobs.setdefault(batch.jobs[0].step.worker, []).extend(batch.jobs)
        found: dict[WorkerName, Worker] = {}
        if "native" in jobs:
            found["native"] = NativeWorker(self._context, self._reductions, self._share.threads, most_output(queue))
        if "torch" in jobs:
            from pymerge.engine.torch_worker import TorchWorker

            found["torch"] = TorchWorker(self._context, self._reductions, jobs["torch"], self._limit)
        if "encode" in jobs:
            from pymerge.engine.encode_worker import EncodeWorker

            found["encode"] = EncodeWorker(self._context, self._share.threads, jobs["encode"], self._limit)
        if "core" in jobs:
            from pymerge.engine.core_worker import CoreWorker

            found["core"] = CoreWorker(self._context, self._share.threads, self._limit, jobs["core"])
        return found

    def _worker(self, batch: Batch) -> Worker:
        return self._workers[batch.jobs[0].step.worker]

    def _begin_ahead(self) -> None:
        """Begin what the window admits; at least one batch, for which outputs may have to be written first."""
        while self._rest and self._window.admits(self._rest[0]):
            batch = self._rest[0]
            if any(batch.jobs[0].follows(begun.batch.jobs[0]) for begun in self._line):
                return
            entry = self._window.entry(batch)
            known = (self._window.first or entry).known
            if self._held() + known + entry.held > self._limit and self._writes:
                if self._line:
                    return
                self._wait_for_writer()
                continue
            self._rest.popleft()
            self._window.push(batch)
            self._line.append(self._begin(batch))

    def _held(self) -> int:
        """Bytes of all inputs and outputs in memory."""
        return self._share.working + self._window.held + sum(write.nbytes for write in self._writes)

    def _begin(self, batch: Batch) -> _Begun:
        for job in batch.jobs:
            self._reductions.start(job)
        if batch.pooled and not self._share.threads:
            return _Begun(batch, [])
        return _Begun(batch, [self._worker(batch).start(job) for job in batch.jobs])

    def _take_turn(self, begun: _Begun) -> None:
        """Conclude a batch; where memory runs out, each of its jobs alone."""
        batch = begun.batch
        self._progress.tensor(batch.name)
        try:
            for job, made in zip(batch.jobs, self._made(begun), strict=True):
                self._conclude(job, made)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            text = f"{batch.name}: out of memory ({first_line(error)}); once more alone, and on without working ahead"
            event("out_of_memory", text, level=WARNING, tensor=batch.jobs[0].step.name)
        begun.futures.clear()  # they hold results, or an exception that does
        self._drain(batch)
        for job in batch.jobs:
            self._alone(job)

    def _made(self, begun: _Begun) -> list[Made]:
        """Results of the jobs of a batch, in its turn."""
        batch, futures = begun.batch, begun.futures
        while self._writes and self._writes[0].done:
            self._wait_for_writer()
        entry = self._window.entry(batch)
        while self._writes and self._held() + entry.peak - entry.held > self._limit:
            self._wait_for_writer()
        began = time.perf_counter_ns()
        found = self._worker(batch).finish(batch, futures)
        if batch.pooled:
            self._waited += time.perf_counter_ns() - began
            self._reading += sum(made.reading for made in found)
            self._working += sum(made.reading + made.computing for made in found)
        return found

    def _conclude(self, job: Job, made: Made) -> None:
        """Add what a job has mapped, or hand what it has merged to the writer."""
        if job.reduces and not job.merges:
            self._reductions.add(job, made.mapped)
        self._reductions.end(job)
        if made.merged is not None:
            self._write(job, made.merged)

    def _alone(self, job: Job) -> None:
        """Carry out a job with nothing else in memory: whole; if that fails, in halves where rows are independent."""
        parts = [job]
        if len(halves := pieces.halves(job.step.action, job.piece)) > 1:
            parts += [replace(job, piece=half, footprint=job.step.footprint(half)) for half in halves]
        for number, part in enumerate(parts):
            try:
                self._once(part)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if number > 0 or len(parts) == 1:
                    raise _out_of_memory(part, self._run, error) from error
                self._free()
            else:
                if number == 0:
                    return

    def _once(self, job: Job) -> None:
        (made,) = self._made(_Begun(Batch((job,)), []))
        self._conclude(job, made)
        del made
        while self._writes:
            self._wait_for_writer()

    def _drain(self, batch: Batch) -> None:
        """Free all that is in memory; what was begun is begun again in its turn.

        The limit was too high for what the machine has: from now on every job is alone.
        """
        for begun in reversed(self._line):
            for future in begun.futures:
                future.cancel()
            self._rest.appendleft(begun.batch)
        for begun in self._line:
            for future in begun.futures:
                if not future.cancelled():
                    future.exception()  # waits; an error comes again with the second attempt
        self._line.clear()
        self._rest = deque(Batch((job,)) for waiting in self._rest for job in waiting.jobs)
        self._share = _NO_SHARE
        self._window = Window(0, self._share)
        self._window.push(batch)
        self._free()

    def _free(self) -> None:
        while self._writes:
            self._wait_for_writer()
        for worker in self._workers.values():
            worker.free()

    def _write(self, job: Job, merged: Any) -> None:
        """Hand what a job has made to the writers; waits until no more than a few are with them."""
        self._writes.append(self._writers.submit(self._workers[job.step.worker], job, merged))
        while not may_wait([(write.native, write.nbytes) for write in self._writes]):
            self._wait_for_writer()

    def _wait_for_writer(self) -> None:
        """Wait for the oldest write."""
        with self._tracer.span("wait for the writer", ""):
            self._writes.popleft().end()


def _out_of_memory(job: Job, run: Runner, error: BaseException) -> OutOfMemoryError:
    device = "cpu" if job.pooled else str(run.device)
    remedy = "give --device cpu" if device.startswith("cuda") else "give a lower --memory, use a machine with more"
    return OutOfMemoryError(
        f"{job.step.name}: {job.step.action.label} on {list(job.piece.shape)} runs out of memory on {device}, with "
        f"nothing else in memory too ({first_line(error)}); end other programs that use it, or {remedy}; the same "
        "command goes on where this one stopped"
    )
