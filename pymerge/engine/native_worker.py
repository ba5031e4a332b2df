"""Native worker: jobs from files to memory in C++, on threads of a pool, each job on one; without PyTorch."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from pymerge.backends.native.combine import convert
from pymerge.backends.native.combine_files import FileTensor, combine_files, is_finite
from pymerge.checkpoint.reader import failed_read
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.shared_rows import SharedRows
from pymerge.common.arrays import Array, rows_of
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, is_float8, native_dtype
from pymerge.engine.factors_of_steps import FactorsOfSteps
from pymerge.engine.worker import Context, Made, Reductions, Store, failed, raise_nonfinite
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Combine, Elementwise
from pymerge.methods.reduce import Reduce, merge_whole
from pymerge.methods.rows import Rows
from pymerge.ops.low_rank_sum import LowRankSum
from pymerge.planner.added import Added, added
from pymerge.planner.jobs import Batch, Job
from pymerge.planner.pieces import Piece, rows_at_once
from pymerge.planner.steps import BLOCK_ELEMENTS, CACHE_LINE


class NativeWorker:
    """Reads pieces and combines, maps or merges them.

    Memory is used again: that of outputs, all of the size of the largest (`output_bytes`), and that of inputs. A
    weighted sum needs none for its inputs: they are read and combined block by block, unless they must be decoded.
    """

    def __init__(self, context: Context, reductions: Reductions, threads: int, output_bytes: int) -> None:
        self._run = context.run
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._allow_nonfinite = context.allow_nonfinite
        self._keeps_cache = context.keeps_cache
        self._reductions = reductions
        self._output_bytes = output_bytes
        self._outputs: list[Array] = []  # memory that nobody uses
        self._inputs: list[Array] = []
        self._held: dict[tuple[int, int], Array] = {}  # inputs between passes, by step and first row
        self._factors = FactorsOfSteps(context.reader)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="pymerge-native")

    def start(self, job: Job) -> Future[Made]:
        """Have a thread work on a job."""
        try:
            room = self._room(job)
        except MemoryError as error:
            return failed(error)
        for entry in job.step.inputs if job.reads else ():
            self._reader.announce(entry, job.piece.start, job.piece.stop)
        return self._pool.submit(self.work, job, room)

    def finish(self, batch: Batch, started: list[Future[Made]]) -> list[Made]:
        """Wait for a job, or work on it now."""
        (job,) = batch.jobs
        made = started[0].result() if started else self.work(job, self._room(job))
        if job.ends_step:
            self._factors.forget(job.step)
        started.clear()  # futures keep their results
        return [made]

    def store(self, job: Job, merged: Array, store: Store) -> None:
        """Have a merged piece written."""
        store.write(job.step.name, merged.bytes)

    def reuse(self, merged: Array) -> None:
        """Nobody uses the memory of a merged piece any more."""
        self._outputs.append(merged.whole())

    def freed(self, batch: Batch) -> None: ...

    def free(self) -> None:
        """Give back all memory that no job is using; inputs that were held are read again."""
        self._outputs.clear()
        with self._lock:
            self._inputs.clear()
            self._held.clear()
        self._factors.clear()

    def close(self) -> None:
        """End the threads, after the jobs that are worked on."""
        self._pool.shutdown(cancel_futures=True)

    def _room(self, job: Job) -> Array | None:
        """Memory for what a job merges; None in a pass that maps. Raises MemoryError."""
        if not job.merges:
            return None
        return self._outputs.pop() if self._outputs else Array.mapped(self._output_bytes)

    def work(self, job: Job, room: Array | None) -> Made:
        """Read a piece, and combine, map or merge it, by any thread. Raises as `finish`."""
        began = time.perf_counter_ns()
        step, piece = job.step, job.piece
        nbytes = step.bytes_of(piece)
        out = None if room is None else room.at(0, step.dtype, piece.shape)
        with self._tracer.span("combine", step.name, nbytes):
            if isinstance(step.action, Combine) and (step.by_blocks or step.product):
                assert out is not None
                product, action = added(step, step.inputs[0]) if step.product else None, step.action
                reading, finite = self._sum(job, product, out) if product else self._combine(job, action, out)
                made = Made(out, None, reading)
            else:
                try:
                    made, finite = self._compute(job, out)
                except ArgumentError as error:
                    raise ArgumentError(f"{step.name}: {error}") from error
            if not (finite or self._allow_nonfinite or step.infinite):
                raise_nonfinite(job, self._reader)
            if job.reads_last and not self._keeps_cache:
                for entry in step.inputs:
                    self._reader.release(entry, piece.start, piece.stop)
        if job.reads:
            self._progress.advance(nbytes)
        return made._replace(computing=time.perf_counter_ns() - began - made.reading)

    def _combine(self, job: Job, action: Combine, out: Array) -> tuple[int, bool]:
        """Write a weighted sum or a copy to `out`; returns nanoseconds of reading, and whether all is finite."""
        step, piece = job.step, job.piece
        inputs = step.inputs
        if step.copies_bits:
            began = time.perf_counter_ns()
            self._reader.read_bytes_into(inputs[0], out.bytes, piece.start, piece.stop)
            return time.perf_counter_ns() - began, _is_finite(out)
        if action.weights:
            self._run.choice("combine", frozenset({step.dtype, *(entry.dtype for entry in inputs)}), piece.shape)
        has_base = action.on_base or not action.weights
        with self._reader.places(inputs, piece.start, piece.stop) as places:
            files = [FileTensor(*place, entry.dtype) for place, entry in zip(places, inputs, strict=True)]
            done = combine_files(
                out,
                files[0] if has_base else None,
                files[1:] if has_base else files,
                action.weights,
                action.divisor,
                block=BLOCK_ELEMENTS,
                check_inputs=not (self._allow_nonfinite or action.shows_nonfinite),
            )
            if done.failed >= 0:
                raise failed_read(inputs[done.failed], done.errno, done.offset)
        return done.reading, done.finite

    def _sum(self, job: Job, made: Added, out: Array) -> tuple[int, bool]:
        """Write the base plus a product to `out`, a few rows at a time; returns as `_combine` does."""
        step, piece, reading = job.step, job.piece, 0
        base = made.product.base
        left, right, scale = self._factors.of(job, step.inputs[0], made)
        out = out.at(0, step.dtype, (out.shape[0], right.columns))
        count = rows_at_once(step.role, step.shape)
        memory = self._take(min(count, out.shape[0]) * right.columns * ITEM_SIZES[base.dtype])
        for first in range(0, out.shape[0], count):
            stop = min(first + count, out.shape[0])
            rows = memory.at(0, base.dtype, (stop - first, right.columns))
            began = time.perf_counter_ns()
            self._reader.read_bytes_into(base, rows.bytes, piece.start + first, piece.start + stop)
            reading += time.perf_counter_ns() - began
            self._run(LowRankSum(rows, rows_of(left, first, stop), right, scale, out=rows_of(out, first, stop)))
        self._give(memory)
        return reading, is_finite(out)

    def _compute(self, job: Job, out: Array | None) -> tuple[Made, bool]:
        """Read the inputs and run ops on them; returns what was made, and whether all that was looked at is finite."""
        memory, filled = self._take_inputs(job)
        holds = filled
        try:
            arrays, reading = self._read(job, memory, filled)
            base, experts = (arrays[0], arrays[1:]) if job.step.reads_base else (arrays[0], arrays)
            rows = Rows(base, experts, job.step.dtype, job.first, job.piece.start, out)
            mapped = self._run_ops(job, rows)
            finite = self._finite(job, arrays, mapped, out)
            holds = job.step.held and not job.merges
        finally:
            self._return_inputs(job, memory, holds)
        return Made(out, mapped, reading), finite

    def _run_ops(self, job: Job, rows: Rows) -> object:
        """Merge rows into their memory, or return their contribution to a pass."""
        action, run = job.step.action, self._run
        if isinstance(action, Combine) and not action.weights:
            assert rows.out is not None
            convert(rows.base if action.on_base else rows.experts[0], rows.out)
            return None
        if isinstance(action, (Combine, Elementwise)):
            run(action.op(rows))
            return None
        assert isinstance(action, Reduce)
        if not job.reduces:
            merge_whole(action, run, rows)
            return None
        state = self._reductions.of(job)
        if not job.merges:
            return state.map(run, rows)
        state.merge(run, rows)
        return None

    def _finite(self, job: Job, inputs: list[Array], mapped: object, out: Array | None) -> bool:
        """Whether the result is finite; of a pass that maps, the inputs, where it is the first one."""
        if self._allow_nonfinite:
            return True
        if out is None:
            # NaN in one piece shows in the result of others.
            return job.number > 0 or self._reductions.of(job).finite(mapped) or all(map(is_finite, inputs))
        if not job.step.action.shows_nonfinite and not (job.reduces or all(map(is_finite, inputs))):
            return False
        return is_finite(out)

    def _read(self, job: Job, memory: Array, filled: bool) -> tuple[list[Array], int]:
        """The inputs of a job in memory, each from a cache line on, and nanoseconds of reading."""
        step, piece = job.step, job.piece
        arrays: list[Array] = []
        at = 0
        began = time.perf_counter_ns()
        for entry in step.inputs:
            array = memory.at(at, native_dtype(entry.dtype), piece.shape)
            if not filled:
                self._read_one(job, entry, array, arrays[0] if arrays and step.reads_base else None)
            arrays.append(array)
            at += -(-array.nbytes // CACHE_LINE) * CACHE_LINE
        return arrays, time.perf_counter_ns() - began

    def _read_one(self, job: Job, entry: TensorEntry, to: Array, base: Array | None) -> None:
        """Read an input; what is made of the base's rows is made of those in memory, if they are there."""
        step, piece = job.step, job.piece
        if base is None or base.dtype != step.base.dtype or not entry.adapter_parts:
            self._fill(entry, piece, to)
            return
        if (made := added(step, entry)) is None:
            shared = SharedRows(self._reader, step.base, piece.start, base.bytes)
            return shared.read_bytes_into(entry, to.bytes, piece.start, piece.stop)
        left, right, scale = self._factors.of(job, entry, made)
        rows, result = (each.at(0, each.dtype, (piece.shape[0], right.columns)) for each in (base, to))
        self._run(LowRankSum(rows, left, right, scale, out=result))

    def _fill(self, entry: TensorEntry, piece: Piece, array: Array) -> None:
        """Read the rows of a piece, decoded where they are 8-bit floats."""
        if entry.dtype == array.dtype:
            self._reader.read_bytes_into(entry, array.bytes, piece.start, piece.stop)
            return
        from pymerge.checkpoint.dequantise.numbers import byte_table, look_up

        codes = self._reader.read_bytes(entry, piece.start, piece.stop)
        look_up(byte_table(entry.dtype), codes, array.numpy().reshape(-1))

    def _take_inputs(self, job: Job) -> tuple[Array, bool]:
        """Memory for the inputs of a job, and whether they are in it, held since an earlier pass."""
        sizes = [ITEM_SIZES[native_dtype(entry.dtype)] for entry in job.step.inputs]
        nbytes = sum(math.prod(job.piece.shape) * size + CACHE_LINE for size in sizes)
        with self._lock:
            if (held := self._held.pop(_place(job), None)) is not None:
                return held, True
        return self._take(nbytes), False

    def _take(self, nbytes: int) -> Array:
        """Memory of so many bytes or more."""
        with self._lock:
            for index, memory in enumerate(self._inputs):
                if memory.nbytes >= nbytes:
                    return self._inputs.pop(index)
            if self._inputs:  # too small: sooner or later all are as large as the largest pieces
                self._inputs.pop()
        return Array.mapped(nbytes)

    def _give(self, memory: Array) -> None:
        with self._lock:
            self._inputs.append(memory)

    def _return_inputs(self, job: Job, memory: Array, holds: bool) -> None:
        """Keep memory for later use, or what is in it for the next pass."""
        with self._lock:
            if holds:
                self._held[_place(job)] = memory
        if not holds:
            self._give(memory)


def _is_finite(copied: Array) -> bool:
    """Whether none of the elements is NaN or infinite, of any dtype."""
    if not is_float8(copied.dtype):
        return copied.dtype not in NATIVE or is_finite(copied)
    import numpy as np

    from pymerge.checkpoint.dequantise.numbers import byte_values

    return bool(np.isfinite(byte_values(copied.dtype))[np.frombuffer(copied.bytes, np.uint8)].all())


def _place(job: Job) -> tuple[int, int]:
    return id(job.step), job.piece.start
