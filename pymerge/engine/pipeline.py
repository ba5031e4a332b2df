"""The pipeline of a merge: reads ahead, computes, writes behind, and never holds more than its limit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from logging import WARNING

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite, is_finite, overflow
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype, upcast
from pymerge.common.events import event
from pymerge.common.progress import ProgressSink
from pymerge.engine.memory import Heap
from pymerge.engine.passes import Passes
from pymerge.engine.trace import StepLog, Times, Tracer
from pymerge.engine.transfer import transfer_to
from pymerge.errors import ArgumentError, BackendError, OutOfMemoryError
from pymerge.ops._op import at_most_threads
from pymerge.output.directory import OutputDirectory
from pymerge.planner import pieces
from pymerge.planner.jobs import READ_THREADS, Batch, Slot
from pymerge.planner.window import Window, may_wait

Loads = list[Future[list[Tensor]]]  # of each slot of a batch, all inputs


class Pipeline:
    """Carries out batches in their order: a few threads read, this one computes, one writes.

    All decisions are made by the computing thread, so nothing here is locked. What is held at any time are the inputs
    of the batches admitted by `Window`, scratch and output of the one that is computed, and outputs that wait for the
    writer; together never more than `limit` bytes.
    """

    def __init__(
        self,
        queue: Sequence[Batch],
        limit: int,
        run_op: Runner,
        reader: Reader,
        output: OutputDirectory,
        tracer: Tracer,
        progress: ProgressSink,
        *,
        allow_nonfinite: bool,
        keeps_cache: bool,
    ) -> None:
        self._rest = deque(queue)  # not yet being read
        self._line: deque[tuple[Batch, Loads]] = deque()  # being read, the next to be computed first
        self._writes: deque[tuple[Future[None], list[Tensor], int]] = deque()  # under way, with their bytes
        self._limit = limit
        self._window = Window(limit)
        self._run_op = run_op
        self._reader = reader
        self._output = output
        self._tracer = tracer
        self._progress = progress
        self._allow_nonfinite = allow_nonfinite
        self._keeps_cache = keeps_cache
        self._transfer = transfer_to(run_op.device, [slot for batch in queue for slot in batch.slots], tracer, limit)
        self._heap = Heap(limit)
        self._passes = Passes(run_op)
        self._inputs: dict[tuple[str, int], Future[list[Tensor]]] = {}  # inputs of pieces of a step in several passes
        # Elementwise work waits on memory, and readers need the processor beside it: a team of threads that does not
        # get all its cores waits for a time slice at every barrier.
        self._elementwise_threads = max(1, torch.get_num_threads() - READ_THREADS)
        self._log = StepLog()
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="pymerge-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pymerge-write")

    def run(self) -> None:
        """Work through the queue. The first exception of any thread ends it."""
        try:
            while self._rest or self._line:
                self._read_ahead()
                batch, loads = self._line.popleft()
                for slot in batch.slots:
                    self._log.begins(slot)
                with self._tracer.span("step", batch.name):
                    self._carry_out(batch, loads)
                for slot in batch.slots:
                    self._log.ends(slot)
                self._window.pop()
                self._heap.freed(batch.memory.peak)
            while self._writes:
                self._wait_for_writer()
        finally:
            self._readers.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)

    @property
    def times(self) -> Times:
        seconds = self._tracer.seconds
        return Times(seconds("wait for inputs"), seconds("compute"), seconds("wait for the writer"))

    @property
    def backends(self) -> dict[str, str]:
        return {op: choice.backend for op, choice in self._run_op.choices.items()}

    def _read_ahead(self) -> None:
        """Start to read what the window admits; at least one batch, for which outputs may have to be written first."""
        while self._rest and self._window.admits(self._rest[0].memory):
            if self._held() + self._rest[0].memory.inputs > self._limit and self._writes:
                if self._line:
                    return
                self._wait_for_writer()
                continue
            batch = self._rest.popleft()
            self._window.push(batch.memory)
            loads = [self._start_reading(slot) for slot in batch.slots]
            self._line.append((batch, loads))

    def _held(self) -> int:
        """Bytes of all inputs and outputs in memory."""
        return self._window.inputs + sum(nbytes for _, _, nbytes in self._writes)

    def _start_reading(self, slot: Slot) -> Future[list[Tensor]]:
        place = slot.step.name, slot.piece.start
        if slot.number > 0 and place in self._inputs:
            return self._inputs[place] if not slot.merges else self._inputs.pop(place)
        reading = self._submit(slot)
        if slot.step.held and not slot.merges:
            self._inputs[place] = reading
        return reading

    def _submit(self, slot: Slot) -> Future[list[Tensor]]:
        try:
            rooms = [self._transfer.prepare(entry, slot.piece) for entry in slot.step.inputs]
        except (MemoryError, RuntimeError) as error:
            failed: Future[list[Tensor]] = Future()
            failed.set_exception(error)  # raised in the piece's turn
            return failed
        return self._readers.submit(self._load, slot, rooms)

    def _load(self, slot: Slot, rooms: Sequence[Tensor | None]) -> list[Tensor]:
        for entry in slot.step.inputs:
            self._reader.announce(entry, slot.piece.start, slot.piece.stop)
        return [self._load_one(slot, entry, room) for entry, room in zip(slot.step.inputs, rooms, strict=True)]

    def _load_one(self, slot: Slot, entry: TensorEntry, room: Tensor | None) -> Tensor:
        piece = slot.piece
        nbytes = entry.nbytes * (piece.stop - piece.start) // max(1, _rows(entry))
        with self._tracer.span("read", entry.name, nbytes):
            tensor = upcast(self._transfer.load(self._reader, entry, piece, room))
            if slot.reads_last and not self._keeps_cache:
                self._reader.release(entry, piece.start, piece.stop)
        self._progress.advance(nbytes)
        return tensor

    def _carry_out(self, batch: Batch, loads: Loads) -> None:
        self._progress.tensor(batch.name)
        if not self._attempt(batch, loads):
            loads.clear()  # they hold tensors, or an exception that does
            self._drain(batch)
            for slot in batch.slots:
                self._carry_out_in_halves(slot)

    def _attempt(self, batch: Batch, loads: Loads) -> bool:
        """Compute a batch and hand it to the writer; False if memory ran out."""
        memory = batch.memory
        try:
            inputs = self._wait_for(batch, loads)
            while self._writes and (
                self._writes[0][0].done() or self._held() + memory.scratch + memory.output > self._limit
            ):
                self._wait_for_writer()
            room = self._room_for_result(batch)
            merged = self._compute(batch, inputs, room)
            used = [
                *([] if self._keeps_inputs(batch) else chain.from_iterable(inputs)),
                *([] if room is None else [room]),
            ]
            kept = {_address(result) for result in merged}
            self._transfer.reuse(each for each in used if _address(each) not in kept)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            text = f"{batch.name}: out of memory ({_first_line(error)}); once more in smaller blocks, and on without "
            event("out_of_memory", text + "reading ahead", level=WARNING, tensor=batch.slots[0].step.name)
            return False
        del inputs, used, room
        self._write(batch, merged)
        return True

    def _keeps_inputs(self, batch: Batch) -> bool:
        """Whether another pass needs them."""
        slot = batch.slots[0]
        return (slot.step.name, slot.piece.start) in self._inputs

    def _carry_out_in_halves(self, slot: Slot) -> None:
        """With nothing else in memory, and in two row ranges if the action allows it."""
        step, piece = slot.step, slot.piece
        try:
            for part in pieces.halves(step.action, piece):
                half = replace(slot, piece=part, memory=step.memory(part))
                alone = Batch((half,))
                merged = self._compute(alone, self._wait_for(alone, [self._start_reading(half)]))
                self._write(alone, merged)
                del merged
                while self._writes:
                    self._wait_for_writer()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            device = self._run_op.device
            raise OutOfMemoryError(
                f"{step.name}: {step.action.label} on {list(piece.shape)} runs out of memory on {device}, with nothing "
                f"else in memory too ({_first_line(error)}); end other programs that use it, "
                f"{'give --device cpu' if device.type == 'cuda' else 'use a machine with more'}, or exclude that "
                "tensor; the same command goes on where this one stopped"
            ) from error

    def _drain(self, batch: Batch) -> None:
        """Free all that is in memory; what was read ahead is read again in its turn.

        The limit was too high for what the machine has: from now on nothing is read ahead, and every piece is alone.
        """
        for waiting, loads in reversed(self._line):
            for load in loads:
                load.cancel()
            self._rest.appendleft(waiting)
        for _, loads in self._line:
            for load in loads:
                if not load.cancelled():
                    load.exception()  # waits; an error comes again with the second attempt
        self._line.clear()
        self._inputs.clear()
        self._rest = deque(Batch((slot,)) for waiting in self._rest for slot in waiting.slots)
        self._window = Window(0)
        self._window.push(batch.memory)
        while self._writes:
            self._wait_for_writer()
        self._transfer.free()
        self._heap.trim()

    def _wait_for(self, batch: Batch, loads: Loads) -> list[list[Tensor]]:
        """The inputs of each piece."""
        with self._tracer.span("wait for inputs", batch.name):
            tensors = [load.result() for load in loads]
        loads.clear()  # futures keep their results
        return tensors

    def _wait_for_writer(self) -> None:
        """Wait for the oldest write."""
        with self._tracer.span("wait for the writer", ""):
            writing, merged, _ = self._writes.popleft()
            writing.result()
            self._transfer.reuse(merged)

    def _room_for_result(self, batch: Batch) -> Tensor | None:
        """Memory for the result of a row range; what else is computed takes its own, and needs that of others."""
        first = batch.slots[0]
        if first.step.action.chunkable:
            return self._transfer.result(first.piece.shape, torch_dtype(first.step.dtype))
        if not _is_range(first):
            self._transfer.free()
        return None

    def _compute(self, batch: Batch, inputs: list[list[Tensor]], room: Tensor | None = None) -> list[Tensor]:
        """The merged pieces on the device, in the output's dtype; that of one row range may be in `room`."""
        device = self._run_op.device
        step = batch.slots[0].step  # all of a batch have its action, layout and dtypes
        threads = nullcontext() if step.action.takes_matrices else at_most_threads(self._elementwise_threads)
        with self._tracer.span("compute", batch.name), threads:
            if not self._allow_nonfinite:
                for slot, tensors in zip(batch.slots, inputs, strict=True):
                    # What is found in one range shows in the result of others.
                    if not step.action.shows_nonfinite or (step.in_ranges and slot.number == 0):
                        _check_inputs(slot, tensors)
            bases = [tensors[0] for tensors in inputs]
            experts = [tensors[1:] if step.reads_base else tensors for tensors in inputs]
            dtype = torch_dtype(step.dtype)
            try:
                if step.in_ranges:
                    result = self._passes.run(batch.slots[0], bases[0], experts[0])
                    merged = [] if result is None else [result]
                else:
                    merged = pieces.run_batch(step.action, step.layer, self._run_op, bases, experts, dtype, room)
            except ArgumentError as error:
                raise ArgumentError(f"{batch.name}: {error}") from error
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                raise BackendError(
                    f"{batch.name}: {step.action.label} failed on {device} ({_first_line(error)}); "
                    "try --backend reference, and report this"
                ) from error
            for slot, tensors, result in zip(batch.slots, inputs, merged, strict=bool(merged)):
                if not self._allow_nonfinite and not is_finite(result):
                    _check_inputs(slot, tensors)
                    raise overflow(slot.step.name, step.dtype)
            self._transfer.finish()
        return merged

    def _write(self, batch: Batch, merged: list[Tensor]) -> None:
        """Hand results, if there are any, to the writer; waits until no more than a few are with it."""
        if not merged:
            return
        nbytes = sum(result.nbytes for result in merged)
        self._writes.append((self._writer.submit(self._store, batch, merged), merged, nbytes))
        while not may_wait([waiting for _, _, waiting in self._writes]):
            self._wait_for_writer()

    def _store(self, batch: Batch, merged: list[Tensor]) -> None:
        for slot, result in zip(batch.slots, merged, strict=True):
            name = slot.step.name
            with self._tracer.span("write", name, result.nbytes):
                self._output.write(name, self._transfer.store(name, result))
            self._progress.advance(result.nbytes)


def _check_inputs(slot: Slot, tensors: Sequence[Tensor]) -> None:
    """Raise NonFiniteError, which names file and tensor, if an input holds NaN or infinity."""
    for entry, tensor in zip(slot.step.inputs, tensors, strict=True):
        check_finite(entry, slot.piece.start, tensor)


def _is_range(slot: Slot) -> bool:
    """Whether the next pieces will have the size of this one: then memory is used again as it is."""
    return slot.step.action.chunkable or slot.step.in_ranges


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows(entry: TensorEntry) -> int:
    return entry.shape[0] if entry.shape else 1


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on CUDA that is a class, on the CPU a RuntimeError of PyTorch's allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
