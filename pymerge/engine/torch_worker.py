"""Worker of PyTorch: jobs on tensors, read by a few threads and computed by the leading one, on a CPU or on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor

from pymerge.checkpoint.finite import is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.shared_rows import SharedRows
from pymerge.common.arrays import as_tensor
from pymerge.common.dtypes import torch_dtype
from pymerge.engine.matrices import Abreast
from pymerge.engine.memory import Heap
from pymerge.engine.transfer import transfer_to
from pymerge.engine.worker import (
    Context,
    Made,
    Reductions,
    Store,
    blaming,
    check_input,
    failed,
    first_line,
    raise_nonfinite,
)
from pymerge.errors import ArgumentError, OutOfMemoryError
from pymerge.methods.actions import Action, Combine, Elementwise, Run, Solve
from pymerge.methods.reduce import Reduce, merge_whole
from pymerge.methods.rows import Rows
from pymerge.ops._op import at_most_threads
from pymerge.planner.jobs import Batch, Job, read_threads
from pymerge.planner.pieces import by_rows


class TorchWorker:
    """Reads pieces to the device, by a few threads, and computes them there in their turn.

    `jobs` are all that it will be given, `limit` is that of all tensors.
    """

    def __init__(self, context: Context, reductions: Reductions, jobs: Sequence[Job], limit: int) -> None:
        self._run = context.run
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._allow_nonfinite = context.allow_nonfinite
        self._keeps_cache = context.keeps_cache
        self._reductions = reductions
        self._transfer = transfer_to(torch.device(str(self._run.device)), jobs, self._tracer, limit)
        self._heap = Heap(limit)
        self._inputs: dict[tuple[int, int], Future[list[Tensor]]] = {}  # of pieces between two passes
        # Elementwise work waits on memory, and readers need the processor beside it: a team of threads that does not
        # get all its cores waits for a time slice at every barrier.
        readers = read_threads(self._run.device.type)
        self._elementwise_threads = max(1, torch.get_num_threads() - readers)
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="pymerge-read")
        self._gathering = ThreadPoolExecutor(readers, thread_name_prefix="pymerge-gather")  # waits for readers
        self._abreast = Abreast(self._run, self._tracer)

    def start(self, job: Job) -> Future[list[Tensor]]:
        """Start to read the inputs of a job, unless they are held since an earlier pass."""
        place = _place(job)
        if job.number > 0 and place in self._inputs:
            return self._inputs[place] if not job.merges else self._inputs.pop(place)
        reading = self._submit(job)
        if job.step.held and not job.merges:
            self._inputs[place] = reading
        return reading

    def _submit(self, job: Job) -> Future[list[Tensor]]:
        try:
            rooms = [self._transfer.prepare(entry, job.piece) for entry in job.step.inputs]
        except (MemoryError, RuntimeError) as error:
            return failed(error)
        if job.step.shares_base:
            return self._readers.submit(self._load_adapters, job, rooms)
        return self._gathering.submit(self._load, job, rooms)

    def _load(self, job: Job, rooms: Sequence[Tensor | None]) -> list[Tensor]:
        """Have the inputs of a job read, side by side."""
        self._announce(job)
        inputs = zip(job.step.inputs, rooms, strict=True)
        loads = [self._readers.submit(self._load_one, job, self._reader, *each) for each in inputs]
        wait(loads)  # all, even where one fails: their memory is free then
        return [load.result() for load in loads]

    def _load_adapters(self, job: Job, rooms: Sequence[Tensor | None]) -> list[Tensor]:
        """Read the base and the adapters that are made of its rows; by a thread of the pool."""
        self._announce(job)
        reader = self._sharing(job)
        return [self._load_one(job, reader, entry, room) for entry, room in zip(job.step.inputs, rooms, strict=True)]

    def _announce(self, job: Job) -> None:
        for entry in job.step.inputs:
            self._reader.announce(entry, job.piece.start, job.piece.stop)

    def _sharing(self, job: Job) -> SharedRows:
        """A reader that has the base's rows, of which the adapters' are made."""
        base, piece = job.step.base, job.piece
        with self._tracer.span("read", base.name):
            rows = self._reader.read_bytes(base, piece.start, piece.stop)
        return SharedRows(self._reader, base, piece.start, memoryview(rows))

    def _load_one(self, job: Job, reader: Reader | SharedRows, entry: TensorEntry, room: Tensor | None) -> Tensor:
        piece = job.piece
        nbytes = job.step.bytes_of_input(entry, piece.start, piece.stop)
        with self._tracer.span("read", entry.name, nbytes):
            tensor = self._transfer.load(reader, entry, piece, room)
            if job.reads_last and not self._keeps_cache:
                self._reader.release(entry, piece.start, piece.stop)
        self._progress.advance(nbytes)
        return tensor

    def finish(self, batch: Batch, started: list[Future[list[Tensor]]]) -> list[Made]:
        """Compute the jobs of a batch."""
        loads = started or [self.start(job) for job in batch.jobs]
        with self._tracer.span("wait for inputs", batch.name), blaming(batch.name, "reading", self._run.device):
            inputs = [load.result() for load in loads]
        loads.clear()  # futures keep their results
        room = self._room(batch.jobs[0])
        made = self._compute(batch, inputs, room)
        held = _place(batch.jobs[0]) in self._inputs  # for another pass
        used = [*([] if held else chain.from_iterable(inputs)), *([] if room is None else [room])]
        kept = {_address(_tensor(each)) for each in made if each.merged is not None}
        self._transfer.reuse(each for each in used if _address(each) not in kept)
        return made

    def store(self, job: Job, merged: Tensor, store: Store) -> None:
        """Have a merged tensor, on the CPU, written."""
        name = job.step.name
        try:
            with blaming(name, "copying the result", self._run.device):
                stored = self._transfer.store(name, merged)
        except (MemoryError, RuntimeError) as error:  # nothing is computed that could wait, or be done in halves
            raise OutOfMemoryError(
                f"{name}: no memory on the host for a copy of the result ({first_line(error)}); end other programs "
                "that use it, or use a machine with more; the same command goes on where this one stopped"
            ) from error
        store.write(name, stored)
        if stored is not merged:
            store.wait()  # the next one comes to the same memory

    def reuse(self, merged: Tensor) -> None:
        """Nobody uses a merged tensor any more."""
        self._transfer.reuse([merged])

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn."""
        if self._run.device.type == "cpu":  # else none of it was the heap's
            self._heap.freed(batch.footprint.peak)

    def free(self) -> None:
        """Give back all memory that no job is using; inputs that were held are read again."""
        self._inputs.clear()
        self._transfer.free()
        self._heap.trim()

    def close(self) -> None:
        """End the threads that read and solve."""
        self._gathering.shutdown(cancel_futures=True)  # first: it hands work to the readers
        self._readers.shutdown(cancel_futures=True)
        self._abreast.close()

    def _room(self, job: Job) -> Tensor | None:
        """Memory for the result of rows; what else is computed takes its own, and needs that of others."""
        if by_rows(job.step.action):
            return self._transfer.result(job.piece.shape, torch_dtype(job.step.dtype))
        if not job.reduces:
            self._transfer.make_room()
        return None

    def _compute(self, batch: Batch, inputs: Sequence[list[Tensor]], room: Tensor | None) -> list[Made]:
        """The merged pieces on the device, in the output's dtype; that of rows may be in `room`."""
        job = batch.jobs[0]
        step, device = job.step, self._run.device  # all of a batch have its action, layout and dtypes
        threads = nullcontext() if isinstance(step.action, Solve) else at_most_threads(self._elementwise_threads)
        with self._tracer.span("compute", batch.name), threads, blaming(batch.name, step.action.label, device):
            if not self._allow_nonfinite and (not step.action.shows_nonfinite or (job.reduces and job.number == 0)):
                # What is found in one piece shows in the result of others.
                for each, tensors in zip(batch.jobs, inputs, strict=True):
                    for entry, tensor in zip(each.step.inputs, tensors, strict=True):
                        check_input(self._reader, entry, each.piece.start, tensor)
            bases = [tensors[0] for tensors in inputs]
            experts = [tensors[1:] if step.reads_base else tensors for tensors in inputs]
            try:
                if isinstance(step.action, Solve):
                    names = [each.step.name for each in batch.jobs]
                    merged = self._abreast.solve(step.action, step.role, bases, experts, step.dtype, names)
                    made = [Made(each) for each in merged]
                else:
                    rows = Rows(bases[0], experts[0], step.dtype, job.first, job.piece.start, room)
                    made = [self._made(job, rows)]
            except ArgumentError as error:
                raise ArgumentError(f"{batch.name}: {error}") from error
            for each, result in zip(batch.jobs, made, strict=True):
                checked = result.merged is not None and not (self._allow_nonfinite or each.step.infinite)
                if checked and not is_finite(_tensor(result)):
                    raise_nonfinite(each, self._reader)
            self._transfer.finish()
        return made

    def _made(self, job: Job, rows: Rows) -> Made:
        action = job.step.action
        if not job.reduces:
            return Made(merge_rows(action, self._run, rows))
        state = self._reductions.of(job)
        return Made(as_tensor(state.merge(self._run, rows))) if job.merges else Made(None, state.map(self._run, rows))


def merge_rows(action: Action, run: Run, rows: Rows) -> Tensor:
    """Merge rows that are in memory by an action that is not for whole matrices."""
    if isinstance(action, Combine) and not action.weights:
        only = as_tensor(rows.base if action.on_base else rows.experts[0])
        return only.to(torch_dtype(rows.out_dtype))
    if isinstance(action, (Combine, Elementwise)):
        return as_tensor(run(action.op(rows)))
    assert isinstance(action, Reduce)
    return as_tensor(merge_whole(action, run, rows))


def _tensor(made: Made) -> Tensor:
    """The tensor that a job has merged."""
    assert isinstance(made.merged, Tensor)
    return made.merged


def _place(job: Job) -> tuple[int, int]:
    return id(job.step), job.piece.start


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
