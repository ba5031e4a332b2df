"""Encode worker: jobs that make other tensors of some, in PyTorch on threads of a pool, each job on one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import code_of, upcast
from pymerge.engine.memory import Heap
from pymerge.engine.worker import Context, Encoded, Made, Store, rows_read
from pymerge.methods.actions import Encode
from pymerge.ops._op import one_thread
from pymerge.output.layout import layout_file
from pymerge.planner.jobs import Batch, Job


class EncodeWorker:
    """Reads tensors, or rows of them, and encodes them.

    Threads of a team would wait for each other at every small operation, so each job is computed on one. What is made
    for a file whose layout nobody could plan is gathered until it is whole; `jobs` are all that it will be given.
    """

    def __init__(self, context: Context, threads: int, jobs: Sequence[Job], limit: int) -> None:
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._keeps_cache = context.keeps_cache
        self._last = {job.step.file: job.step for job in jobs}
        self._gathered: dict[str, Tensor] = {}  # of the file at work
        self._surplus = 0  # bytes that they might have had beyond those that they have
        self._heap = Heap(limit)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, threads), "pymerge-encode", torch.set_num_threads, (1,))

    def start(self, job: Job) -> Future[Made]:
        """Have a thread work on a job."""
        for entry in job.step.inputs:
            self._reader.announce(entry, job.piece.start, job.piece.stop)
        return self._pool.submit(self._work, job)

    def finish(self, batch: Batch, started: list[Future[Made]]) -> list[Made]:
        """Wait for a job, or work on it now; hand out its tensors, or all of its file with the last of them."""
        (job,) = batch.jobs
        if started:
            made = started[0].result()
        else:
            with one_thread():
                made = self._work(job)
        started.clear()  # futures keep their results
        if job.step.gathered is None:
            return [made]
        assert isinstance(made.merged, Encoded)
        self._gathered |= made.merged.tensors
        self._surplus += job.step.nbytes - made.merged.nbytes
        return [made._replace(merged=self._whole(job.step.file) if job.step is self._last[job.step.file] else None)]

    def _whole(self, file: str) -> Encoded:
        """All tensors of the file at work, and their layout."""
        tensors, self._gathered = self._gathered, {}
        self._progress.advance(self._surplus)
        self._surplus = 0
        layout = layout_file(file, [(name, code_of(each.dtype), tuple(each.shape)) for name, each in tensors.items()])
        return Encoded(tensors, layout)

    def _work(self, job: Job) -> Made:
        action, began = job.step.action, time.perf_counter_ns()
        assert isinstance(action, Encode)
        inputs = [self._read(job, entry) for entry in job.step.inputs]
        read = time.perf_counter_ns()
        with self._tracer.span("encode", job.step.name):
            tensors = action.run(inputs, job.piece.start)
        return Made(Encoded(tensors), None, read - began, time.perf_counter_ns() - read)

    def _read(self, job: Job, entry: TensorEntry) -> Tensor:
        piece = job.piece
        nbytes = entry.stored_in(piece.start, piece.stop)
        with self._tracer.span("read", entry.name, nbytes):
            tensor = upcast(self._reader.read(entry, *rows_read(job)))
            if not self._keeps_cache:
                self._reader.release(entry, piece.start, piece.stop)
        self._progress.advance(nbytes)
        return tensor

    def store(self, job: Job, merged: Encoded, store: Store) -> None:
        """Have tensors written, the layout of their file first if it has none yet."""
        if merged.layout is not None:
            store.settle(merged.layout)
        for name, tensor in merged.tensors.items():
            store.write(name, tensor)

    def reuse(self, merged: Encoded) -> None: ...

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn. Memory of a piece is used again for the next one of its tensor: mapping it page by
        page would take as long as computing."""
        if batch.jobs[0].ends_step:
            self._heap.freed(batch.footprint.peak)

    def free(self) -> None:
        """Give back memory that no job is using."""
        self._heap.trim()

    def close(self) -> None:
        """End the threads, after the jobs that are worked on."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # what later threads start with
