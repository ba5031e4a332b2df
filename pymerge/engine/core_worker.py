"""Core worker: weights whose task vectors are products of factors, solved from these and added to the base's rows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pymerge.adapters.low_rank import low_rank_of
from pymerge.architecture.roles import Role
from pymerge.backends import native
from pymerge.backends.native.combine_files import is_finite
from pymerge.backends.runner import Runner
from pymerge.checkpoint import finite
from pymerge.checkpoint.finite import check_finite, overflow
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array, rows_of
from pymerge.common.blas import one_blas_thread
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, upcast
from pymerge.engine.memory import Heap
from pymerge.engine.worker import Context, Made, Sink, failed, first_line, is_out_of_memory, raise_nonfinite
from pymerge.errors import ArgumentError, BackendError
from pymerge.methods.actions import InCore
from pymerge.methods.core.factors import Delta, Factors, Product
from pymerge.ops._op import one_thread
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

    def __init__(self, context: Context, threads: int, jobs: Sequence[Job], limit: int) -> None:
        on_cpu = context.run.device.type == "cpu"  # where factors are, whatever computes other steps
        self._run = context.run if on_cpu else Runner()
        self._reader = context.reader
        self._tracer = context.tracer
        self._progress = context.progress
        self._allow_nonfinite = context.allow_nonfinite
        self._keeps_cache = context.keeps_cache
        self._solved: dict[int, Future[Delta]] = {}  # by step
        self._lock = threading.Lock()
        self._outputs: list[Array] = []  # memory that nobody uses
        self._rooms = threading.local()  # memory of each thread for rows of the base
        self._heap = Heap(limit)
        self._stack = ExitStack()
        self._stack.enter_context(one_blas_thread())
        self._with_torch = any(_core(job.step).solve.core_needs_torch for job in jobs)
        if self._with_torch:
            import torch

            self._stack.callback(torch.set_num_threads, torch.get_num_threads())  # what later threads start with
        self._pool = ThreadPoolExecutor(max(1, threads), "pymerge-core", self._begin)

    def _begin(self) -> None:
        """A thread of the pool begins."""
        if self._with_torch:
            import torch

            torch.set_num_threads(1)

    def start(self, job: Job) -> Future[Made]:
        """Have a thread work on a job."""
        self._reader.announce(job.step.base, job.piece.start, job.piece.stop)
        try:
            out = self._room(job)
        except MemoryError as error:
            return failed(error)
        return self._pool.submit(self._work, job, out)

    def finish(self, batch: Batch, started: list[Future[Made]]) -> list[Made]:
        """Wait for a job, or work on it now."""
        (job,) = batch.jobs
        if started:
            made = started[0].result()
        else:
            with one_thread() if self._with_torch else nullcontext():
                made = self._work(job, self._room(job))
        started.clear()  # futures keep their results
        if job.ends_step:
            with self._lock:
                self._solved.pop(id(job.step), None)
        return [made]

    def store(self, job: Job, merged: Array, sink: Sink) -> None:
        """Give merged rows to the sink."""
        sink.write(job.step.name, merged.bytes)

    def reuse(self, merged: Array) -> None:
        """Nobody uses the memory of merged rows any more."""
        self._outputs.append(merged.whole())

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn."""
        self._heap.freed(batch.footprint.peak)

    def free(self) -> None:
        """Give back memory that no job is using; what was solved is solved again."""
        with self._lock:
            self._solved.clear()
        self._outputs.clear()
        self._heap.trim()

    def close(self) -> None:
        """End the threads, after the jobs that are worked on."""
        self._pool.shutdown(cancel_futures=True)
        self._stack.close()

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
                self._merge(step, first, rows, room)
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

    def _merge(self, step: Step, first: int, rows: Array, out: Array) -> None:
        """Rows of the base from `first` on, and what is added to them; of a stack, one matrix."""
        role, base, merged = step.role, _matrix(rows, step.role.stacked), _matrix(out, step.role.stacked)
        if not role.stacked:
            self._once(step).add(self._run, base, first, merged)
        elif role.parts == 1:
            self._solve(step, first).add(self._run, base, 0, merged)
        else:
            for number in range(role.parts):
                outputs = role.part(number, base.shape[1 - role.in_axis])
                place = (slice(None), outputs) if role.in_axis == 0 else (outputs, slice(None))
                part, room = _copy(base, place), _copy(merged, place)
                self._solve(step, first, number).add(self._run, part, 0, room)
                _words(merged)[place] = _words(room)

    def _once(self, step: Step) -> Delta:
        """What is added to a weight, from the thread that solves it."""
        with self._lock:
            solved = self._solved.get(id(step))
            mine = solved is None
            if solved is None:
                solved = self._solved[id(step)] = Future()
        if mine:
            try:
                solved.set_result(self._solve(step))
            except BaseException as error:
                solved.set_exception(error)
        return solved.result()

    def _solve(self, step: Step, matrix: int = 0, part: int = 0) -> Delta:
        """Solve one matrix, or one part of it, from its factors."""
        action = _core(step)
        tasks = [self._factors(entry, step.role, matrix, part, action.shape) for entry in step.experts]
        double = "F64" in (step.dtype, *(entry.dtype for entry in step.inputs))
        if all(task.finite for task in tasks):
            delta = self._run_core(step, action, tasks)
        elif self._allow_nonfinite:
            delta = Product(np.full((action.shape[0], 1), math.nan), np.ones((1, action.shape[1])))
        else:
            self._refuse(step)
        with np.errstate(over="ignore"):  # the result is looked at
            return delta.prepared(double, step.role.in_axis)

    @staticmethod
    def _run_core(step: Step, action: InCore, tasks: Sequence[Factors]) -> Delta:
        try:
            return action.solve.run_core(tasks)
        except ArgumentError as error:
            raise ArgumentError(f"{step.name}: {error}") from error
        except (RuntimeError, np.linalg.LinAlgError) as error:
            if is_out_of_memory(error):
                raise
            raise BackendError(
                f"{step.name}: {action.label} failed on the factors ({first_line(error)}); report this"
            ) from error

    def _factors(self, entry: TensorEntry, role: Role, matrix: int, part: int, shape: tuple[int, int]) -> Factors:
        """tau of an expert, d_out x d_in; none where the tensor is the base's own."""
        found = low_rank_of(entry)
        if found is None:
            return Factors(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))
        with self._tracer.span("read", entry.name):
            left, right = found.factors(self._reader.read_bytes, matrix)
        B, A = (right.T, left.T) if role.in_axis == 0 else (left, right)
        return Factors(B[role.part(part, len(B))], A)

    def _refuse(self, step: Step) -> NoReturn:
        """Raise NonFiniteError, which names file and key of what an adapter stores."""
        for entry in step.experts:
            for part in entry.adapter_parts:
                check_finite(part, 0, self._reader.read(part))
        raise overflow(step.name, "F64")  # by a scale


def _core(step: Step) -> InCore:
    assert isinstance(step.action, InCore)
    return step.action


def _is_finite(values: Array) -> bool:
    """Whether no element is NaN or infinite, by native code where there is any."""
    return finite.is_finite(values.tensor()) if native.missing() else is_finite(values)


def _matrix(rows: Array, stacked: bool) -> Array:
    """Rows of any axes as a matrix; of a stack, the one that they are."""
    return rows.at(0, rows.dtype, rows.shape[1:] if stacked else (rows.shape[0], math.prod(rows.shape[1:])))


def _copy(values: Array, place: tuple[slice, slice]) -> Array:
    """Some rows or columns in memory of their own."""
    copied = np.ascontiguousarray(_words(values)[place])
    return Array(copied.ctypes.data, values.dtype, copied.shape, copied)


def _words(values: Array) -> NDArray[Any]:
    """The elements of any dtype as whole numbers of their size, to be moved."""
    return np.frombuffer(values.bytes, f"u{ITEM_SIZES[values.dtype]}").reshape(values.shape)
