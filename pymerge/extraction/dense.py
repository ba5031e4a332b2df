"""Merged tensors that are no products of factors: merged by the executor, to be cut to a rank or kept whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import upcast
from pymerge.common.progress import ProgressSink
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context, Sink
from pymerge.errors import NonFiniteError
from pymerge.extraction.deltas import Delta
from pymerge.extraction.measure import Measured, cut, footprint
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.parts import Portion
from pymerge.extraction.targets import TensorPair
from pymerge.ops._op import one_thread
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import FINISHED, Batch, batches, only
from pymerge.planner.plan import Plan

_REMEDY = "use sound models and adapters, or smaller weights: all numbers of an adapter are finite"

Keep = Callable[[Portion, Sequence[Measured[Tensor]]], None]


def merge(plan: Plan, names: Collection[str], sink: Sink, reader: Reader, progress: ProgressSink) -> None:
    """Merge the tensors of these names in float32, and give them to a sink."""
    _execute(plan, _batches(plan, names), sink, reader, progress, plan.budget.tensors)


def merge_and_cut(
    plan: Plan, parts: Sequence[Portion], options: ExtractOptions, reader: Reader, progress: ProgressSink, keep: Keep
) -> None:
    """Cut the merged differences of all targets of these parts to factors. `keep` takes each part when it is whole.

    Memory holds one difference beside the executor's pieces.
    """
    targets = [target for part in parts for target in part.targets]
    if not targets:
        return
    beside = max(footprint(target, options) for target in targets)
    limit = max(plan.budget.tensors - beside, plan.budget.tensors // 2)
    sink = _Cut(parts, options, reader, keep)
    _execute(plan, _batches(plan, {target.name for target in targets}), sink, reader, progress, limit)


def work_bytes(plan: Plan, names: Collection[str]) -> int:
    """Bytes that progress is told of while tensors of these names are merged."""
    jobs = [job for batch in _batches(plan, names) for job in batch.jobs]
    read = sum(job.step.bytes_of(job.piece) for job in jobs if job.reads)
    return read + sum(job.step.bytes_made(job.piece) for job in jobs if job.merges)


def _batches(plan: Plan, names: Collection[str]) -> list[Batch]:
    return batches(only(plan.steps, names), plan.budget, {FINISHED})


def _execute(
    plan: Plan, queue: Sequence[Batch], sink: Sink, reader: Reader, progress: ProgressSink, limit: int
) -> None:
    with Tracer() as tracer:
        runner = Runner(plan.target.backend, plan.target.device)
        context = Context(runner, reader, tracer, progress, False, plan.keeps_cache)
        try:
            Executor(context, sink, plan.target.threads).run(queue, limit)
        except NonFiniteError as error:  # what helps a merge into a model does not help here
            raise NonFiniteError(error.found, _REMEDY) from error


class _Cut:
    """Sink that gathers the difference of each tensor to the base, and cuts it when it is whole."""

    def __init__(self, parts: Sequence[Portion], options: ExtractOptions, reader: Reader, keep: Keep) -> None:
        self._places = {target.name: (part, target) for part in parts for target in part.targets}
        self._options = options
        self._reader = reader
        self._keep = keep
        self._gathered: dict[str, tuple[Tensor, int]] = {}  # the difference, and how many elements are there
        self._measured: dict[str, Measured[Tensor]] = {}  # of parts that are not whole

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Take the next rows of a tensor, in float32."""
        part, target = self._places[tensor_name]
        rows = torch.frombuffer(data, dtype=torch.float32) if isinstance(data, memoryview) else data.reshape(-1)
        shape = target.base.shape
        whole, there = self._gathered.get(tensor_name) or (torch.empty(target.base.numel), 0)
        width = target.base.numel // shape[0]
        first, last = there // width, (there + rows.numel()) // width
        base = upcast(self._reader.read(target.base, first, last)).float().reshape(-1)
        torch.sub(rows, base, out=whole[there : there + rows.numel()])
        self._gathered[tensor_name] = (whole, there + rows.numel())
        if there + rows.numel() == whole.numel():
            del self._gathered[tensor_name]
            with one_thread():
                self._measured[tensor_name] = cut(target, self._options, list(_matrices(target, whole)))
            if all(each.name in self._measured for each in part.targets):
                self._keep(part, [self._measured.pop(each.name) for each in part.targets])
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""


def _matrices(target: TensorPair, whole: Tensor) -> Iterator[Delta]:
    for matrix in whole.view(target.count, *target.shape):
        yield Delta(target.shape, partial(_rows, matrix), held=True)


def _rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    return matrix[start:stop]
