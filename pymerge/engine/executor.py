"""Executor: carries out the jobs of a plan in order, each by the worker of its step, and hands on what they make."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from logging import WARNING
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.arrays import Array, ArrayLike
from pymerge.common.events import event
from pymerge.common.progress import ProgressSink
from pymerge.engine.native_worker import NativeWorker
from pymerge.engine.trace import StepLog, Times, Tracer
from pymerge.engine.worker import Made, Reductions, Sink, first_line, is_out_of_memory
from pymerge.errors import OutOfMemoryError
from pymerge.planner import pieces
from pymerge.planner.jobs import Batch, Job
from pymerge.planner.window import NativeShare, Window, may_wait, most_output, native_share

if TYPE_CHECKING:
    from pymerge.engine.torch_worker import TorchWorker


class _Begun(NamedTuple):
    """A batch that has been started: what is under way for each of its jobs, and a native job's memory."""

    batch: Batch
    futures: list[Future[Any]]
    room: Array | None


class Executor:
    """Carries out batches in their order: pools of threads read, and compute native jobs; one thread writes.

    The thread that calls `run` leads: it makes all decisions, so nothing here is locked, computes jobs of PyTorch,
    which is imported if there are any, and takes what is made in its turn. `Window` says what may be in memory;
    together with what waits for the writer it is never more than `limit` bytes.

    Args:
        queue: batches of one plan, from pymerge.planner.jobs.
        limit: bytes of all tensors held at once.
        threads: most jobs of native code that are worked on at a time.
        run: runs ops; its device is where tensors are computed.
        sink: takes merged pieces.
    """

    def __init__(
        self,
        queue: Sequence[Batch],
        limit: int,
        threads: int,
        run: Runner,
        reader: Reader,
        sink: Sink,
        tracer: Tracer,
        progress: ProgressSink,
        *,
        allow_nonfinite: bool,
        keeps_cache: bool,
    ) -> None:
        self._rest = deque(queue)  # not begun
        self._line: deque[_Begun] = deque()  # begun, the next to have its turn first
        self._writes: deque[tuple[Future[None], ArrayLike, int]] = deque()  # under way, with their bytes
        self._write_failed = False
        self._limit = limit
        self._share = native_share(queue, limit, threads)
        self._window = Window(limit, self._share)
        self._run = run
        self._reader = reader
        self._sink = sink
        self._tracer = tracer
        self._progress = progress
        self._log = StepLog()
        self._reductions = Reductions()
        self._reading = self._waited = 0  # nanoseconds: native jobs reading, added up; waiting for them
        self._native = NativeWorker(
            run,
            reader,
            self._reductions,
            tracer,
            progress,
            output_bytes=most_output(queue),
            allow_nonfinite=allow_nonfinite,
            keeps_cache=keeps_cache,
        )
        self._torch: TorchWorker | None = None
        if any(not batch.native for batch in queue):
            from pymerge.engine.torch_worker import TorchWorker

            self._torch = TorchWorker(
                run,
                reader,
                self._reductions,
                [job for batch in queue if not batch.native for job in batch.jobs],
                limit,
                tracer,
                progress,
                allow_nonfinite=allow_nonfinite,
                keeps_cache=keeps_cache,
            )
        self._pool = ThreadPoolExecutor(max(1, self._share.threads), thread_name_prefix="pymerge-native")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pymerge-write")

    def run(self) -> None:
        """Work through the queue. The first exception of any thread ends it."""
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
                if self._torch is not None:
                    self._torch.freed(batch)
            while self._writes:
                self._wait_for_writer()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._writer.shutdown()  # what was handed to it is whole: the next run need not make it again
            if self._torch is not None:
                self._torch.close()

    @property
    def times(self) -> Times:
        """Seconds of the leading thread; waiting for native jobs is reading and computing as they do both."""
        seconds = self._tracer.seconds
        busy, waited = seconds("combine"), self._waited / 1e9
        share = min(1.0, self._reading / 1e9 / busy) if busy else 0.0
        reading = seconds("wait for inputs") + waited * share
        return Times(reading, seconds("compute") + waited * (1.0 - share), seconds("wait for the writer"))

    @property
    def backends(self) -> dict[str, str]:
        """Backend that computed each op."""
        return {op: choice.backend for op, choice in self._run.choices.items()}

    def _begin_ahead(self) -> None:
        """Begin what the window admits; at least one batch, for which outputs may have to be written first."""
        while self._rest and self._window.admits(self._rest[0]):
            batch = self._rest[0]
            if any(batch.jobs[0].follows(begun.batch.jobs[0]) for begun in self._line):
                return
            if self._held() + self._window.entry(batch).held > self._limit and self._writes:
                if self._line:
                    return
                self._wait_for_writer()
                continue
            self._rest.popleft()
            self._window.push(batch)
            self._line.append(self._begin(batch))

    def _held(self) -> int:
        """Bytes of all inputs and outputs in memory."""
        return self._share.working + self._window.held + sum(nbytes for _, _, nbytes in self._writes)

    def _begin(self, batch: Batch) -> _Begun:
        for job in batch.jobs:
            self._reductions.start(job)
        if not batch.native:
            assert self._torch is not None
            return _Begun(batch, [self._torch.start(job) for job in batch.jobs], None)
        (job,) = batch.jobs
        if not self._share.threads:
            return _Begun(batch, [], None)  # worked on in its turn
        try:
            room = self._native.room(job)
        except MemoryError as error:
            failed: Future[Made] = Future()
            failed.set_exception(error)  # raised in the job's turn
            return _Begun(batch, [failed], None)
        for entry in job.step.inputs if job.reads else ():
            self._reader.announce(entry, job.piece.start, job.piece.stop)
        return _Begun(batch, [self._pool.submit(self._native.work, job, room)], room)

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
        while self._writes and self._writes[0][0].done():
            self._wait_for_writer()
        if not batch.native:
            assert self._torch is not None
            needed = batch.footprint.scratch + batch.footprint.output
            while self._writes and self._held() + needed > self._limit:
                self._wait_for_writer()
            return self._torch.finish(batch, futures)
        began = time.perf_counter_ns()
        (job,) = batch.jobs
        made: Made = futures[0].result() if futures else self._native.work(job, self._native.room(job))
        futures.clear()
        self._waited += time.perf_counter_ns() - began
        self._reading += made.reading
        return [made]

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
        batch = Batch((job,))
        (made,) = self._made(_Begun(batch, [], None) if job.native else self._begin(batch))
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
        self._share = NativeShare(0, 0, 0)
        self._window = Window(0, self._share)
        self._window.push(batch)
        self._free()

    def _free(self) -> None:
        while self._writes:
            self._wait_for_writer()
        self._native.free()
        if self._torch is not None:
            self._torch.free()

    def _write(self, job: Job, merged: ArrayLike) -> None:
        """Hand a merged piece to the writer; waits until no more than a few are with it."""
        nbytes = merged.nbytes
        self._writes.append((self._writer.submit(self._store, job, merged), merged, nbytes))
        while not may_wait([(isinstance(each, Array), waiting) for _, each, waiting in self._writes]):
            self._wait_for_writer()

    def _store(self, job: Job, merged: ArrayLike) -> None:
        """Give a merged piece to the sink, unless one before it could not be written; by the writer thread."""
        name = job.step.name
        if self._write_failed:
            return
        try:
            with self._tracer.span("write", name, merged.nbytes):
                if isinstance(merged, Array):
                    self._sink.write(name, merged.bytes)
                else:
                    assert self._torch is not None
                    self._sink.write(name, self._torch.store(name, merged))
        except BaseException:
            self._write_failed = True
            raise
        self._progress.advance(merged.nbytes)

    def _wait_for_writer(self) -> None:
        """Wait for the oldest write."""
        with self._tracer.span("wait for the writer", ""):
            writing, merged, _ = self._writes.popleft()
            writing.result()
        if isinstance(merged, Array):
            self._native.reuse(merged)
        elif self._torch is not None:
            self._torch.reuse(merged)


def _out_of_memory(job: Job, run: Runner, error: BaseException) -> OutOfMemoryError:
    device = "cpu" if job.native else str(run.device)
    remedy = "give --device cpu" if device.startswith("cuda") else "give a lower --memory, use a machine with more"
    return OutOfMemoryError(
        f"{job.step.name}: {job.step.action.label} on {list(job.piece.shape)} runs out of memory on {device}, with "
        f"nothing else in memory too ({first_line(error)}); end other programs that use it, {remedy}, or exclude that "
        "tensor; the same command goes on where this one stopped"
    )
