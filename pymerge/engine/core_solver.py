"""Core solver: weights whose task vectors are products of factors, solved from these and added to the base's rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pymerge.backends.runner import Runner
from pymerge.checkpoint.finite import check_finite, overflow
from pymerge.common.arrays import Array, rows_of
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.engine.together import Together, core_of, factors_of_all
from pymerge.engine.worker import Context, first_line, is_out_of_memory
from pymerge.errors import ArgumentError, BackendError
from pymerge.methods.core.deltas import Addend, Delta, Product
from pymerge.methods.core.factors import Factors
from pymerge.planner.pieces import rows_at_once
from pymerge.planner.steps import Step


class CoreSolver:
    """Solves each weight once, by the first thread that needs it, until it is to `forget` it.

    Its callers compute on one thread, in `one_blas_thread`: then no result depends on how many there are.
    """

    def __init__(self, context: Context, together: Together | None = None) -> None:
        on_cpu = context.run.device.type == "cpu"  # where factors are, whatever computes other steps
        self._run = context.run if on_cpu else Runner()
        self._reader = context.reader
        self._tracer = context.tracer
        self._allow_nonfinite = context.allow_nonfinite
        self._together = together or Together(self._run)
        self._solved: dict[int, Future[Addend]] = {}  # by step
        self._lock = threading.Lock()

    def solve_ahead(self, step: Step) -> None:
        """Solve a weight before its rows are asked for. What goes wrong is said when they are."""
        if not step.role.stacked:
            with suppress(Exception):
                self._once(step)

    def forget(self, step: Step) -> None:
        """A weight is done."""
        with self._lock:
            self._solved.pop(id(step), None)

    def clear(self) -> None:
        """Forget all weights; they are solved again."""
        with self._lock:
            self._solved.clear()

    def merge(self, step: Step, first: int, rows: Array, out: Array) -> None:
        """Write to `out` rows of the base from `first` on with what is added to them; of a stack, whole matrices."""
        count = rows_at_once(step.role, step.shape)
        for start in range(0, rows.shape[0], count):
            stop = min(start + count, rows.shape[0])
            self._merge(step, first + start, rows_of(rows, start, stop), rows_of(out, start, stop))

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

    def _once(self, step: Step) -> Addend:
        """Sum that is added to a weight, from the thread that solves it."""
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

    def _solve(self, step: Step, matrix: int = 0, part: int = 0) -> Addend:
        """Solve one matrix, or one part of it, from its factors."""
        action = core_of(step)
        with self._tracer.span("read", step.name):
            tasks = factors_of_all(self._reader, step, matrix, part)
        double = "F64" in (step.dtype, *(entry.dtype for entry in step.inputs))
        delta: Delta
        if all(task.finite for task in tasks):
            delta = self._run_core(step, tasks, matrix, part)
        elif self._allow_nonfinite:
            delta = Product(np.full((action.shape[0], 1), math.nan), np.ones((1, action.shape[1])))
        else:
            self._refuse(step)
        with np.errstate(over="ignore"):  # the result is looked at
            return delta.prepared(double, step.role.in_axis)

    def _run_core(self, step: Step, tasks: Sequence[Factors], matrix: int, part: int) -> Delta:
        try:
            return self._together.solver(self._reader, step, matrix, part).run_core(tasks)
        except ArgumentError as error:
            raise ArgumentError(f"{step.name}: {error}") from error
        except (RuntimeError, np.linalg.LinAlgError) as error:
            if is_out_of_memory(error):
                raise
            raise BackendError(
                f"{step.name}: {step.action.label} failed on the factors ({first_line(error)}); report this"
            ) from error

    def _refuse(self, step: Step) -> NoReturn:
        """Raise NonFiniteError, which names file and key of what an adapter stores."""
        for entry in step.experts:
            for part in entry.adapter_parts:
                check_finite(part, 0, self._reader.read(part))
        raise overflow(step.name, "F64")  # by a scale


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
