"""Core solver: weights whose task vectors are products of factors, solved from these and added to the base's rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NoReturn

import torch
from torch import Tensor

from pymerge.adapters.low_rank import low_rank_of
from pymerge.architecture.roles import Role
from pymerge.checkpoint.finite import check_finite, overflow
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.engine.worker import Context, first_line, is_out_of_memory
from pymerge.errors import ArgumentError, BackendError
from pymerge.methods.actions import TILE_ELEMENTS, InCore
from pymerge.methods.core.factors import Delta, Factors, Product
from pymerge.planner.steps import Step


class CoreSolver:
    """Solves each weight once, by the first thread that needs it, until it is to `forget` it.

    Its callers compute on one thread: then no result depends on how many there are.
    """

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._reader = context.reader
        self._tracer = context.tracer
        self._allow_nonfinite = context.allow_nonfinite
        self._solved: dict[int, Future[Delta]] = {}  # by step
        self._lock = threading.Lock()
        self._sums = threading.local()  # memory of each thread for products

    def forget(self, step: Step) -> None:
        """A weight is done."""
        with self._lock:
            self._solved.pop(id(step), None)

    def clear(self) -> None:
        """Forget all weights; they are solved again."""
        with self._lock:
            self._solved.clear()

    def merge(self, step: Step, first: int, rows: Tensor, out: Tensor) -> None:
        """Write to `out` rows of the base from `first` on with what is added to them; of a stack, whole matrices."""
        dtype = _sum_dtype(step)
        if not step.role.stacked:
            self._add(self._once(step), first, rows, out, dtype)
            return
        for number, (matrix, room) in enumerate(zip(rows, out, strict=True), first):
            for part in range(step.role.parts):
                delta = self._solve(step, number, part)
                self._add(delta, 0, _part_of(step.role, matrix, part), _part_of(step.role, room, part), dtype)

    def _add(self, delta: Delta, first: int, rows: Tensor, out: Tensor, dtype: torch.dtype) -> None:
        """A few rows at a time, which stay in the cache."""
        count, width = rows.shape
        step = max(1, TILE_ELEMENTS // max(1, width))
        size = min(step, count) * width
        room: Tensor | None = getattr(self._sums, "room", None)
        if room is None or room.numel() < size or room.dtype != dtype:
            room = self._sums.room = torch.empty(size, dtype=dtype)
        for top in range(0, count, step):
            tile = rows[top : top + step]
            total = room[: tile.numel()].view(tile.shape)
            out[top : top + step] = delta.rows(self._run, first + top, first + top + len(tile), total).add_(tile)

    def _once(self, step: Step) -> Delta:
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

    def _solve(self, step: Step, matrix: int = 0, part: int = 0) -> Delta:
        """Solve one matrix, or one part of it, from its factors."""
        action = step.action
        assert isinstance(action, InCore)
        tasks = [self._factors(entry, step.role, matrix, part, action.shape) for entry in step.experts]
        if all(task.finite for task in tasks):
            delta = self._run_core(step, action, tasks)
        elif self._allow_nonfinite:
            delta = Product(torch.full((action.shape[0], 1), math.nan), torch.ones(1, action.shape[1]))
        else:
            self._refuse(step)
        return delta.prepared(_sum_dtype(step), step.role.in_axis)

    @staticmethod
    def _run_core(step: Step, action: InCore, tasks: Sequence[Factors]) -> Delta:
        try:
            return action.solve.run_core(tasks)
        except ArgumentError as error:
            raise ArgumentError(f"{step.name}: {error}") from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise BackendError(
                f"{step.name}: {action.label} failed on the factors ({first_line(error)}); report this"
            ) from error

    def _factors(self, entry: TensorEntry, role: Role, matrix: int, part: int, shape: tuple[int, int]) -> Factors:
        """tau of an expert, d_out x d_in; none where the tensor is the base's own."""
        found = low_rank_of(entry)
        if found is None:
            return Factors(torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64))
        with self._tracer.span("read", entry.name):
            left, right = (torch.from_numpy(side) for side in found.factors(self._reader.read_bytes, matrix))
        B, A = (right.mT, left.mT) if role.in_axis == 0 else (left, right)
        return Factors(B[role.part(part, len(B))], A)

    def _refuse(self, step: Step) -> NoReturn:
        """Raise NonFiniteError, which names file and key of what an adapter stores."""
        for entry in step.experts:
            for part in entry.adapter_parts:
                check_finite(part, 0, self._reader.read(part))
        raise overflow(step.name, "F64")  # by a scale


def _part_of(role: Role, matrix: Tensor, part: int) -> Tensor:
    """One of the weights that a matrix holds, as it is stored: a view."""
    outputs = role.part(part, matrix.shape[1 - role.in_axis])
    return matrix[:, outputs] if role.in_axis == 0 else matrix[outputs]


def _sum_dtype(step: Step) -> torch.dtype:
    """The dtype in which W_0 and what is added to it are summed."""
    return torch.float64 if "F64" in (step.dtype, *(entry.dtype for entry in step.inputs)) else torch.float32
