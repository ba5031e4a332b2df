"""Merged tensors that are no products of factors: merged by the executor, and cut to a rank one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import upcast
from pymerge.common.progress import NoProgress
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.extraction.deltas import Delta
from pymerge.extraction.measure import Measured, cut, footprint
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import Target
from pymerge.ops._op import one_thread
from pymerge.output.layout import ShardLayout
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan

_DONE = ""  # no file of a plan


def merge_and_cut(plan: Plan, targets: Sequence[Target], options: ExtractOptions, reader: Reader) -> list[Measured]:
    """Factors of the merged differences, in the order of the targets. Memory holds one of them beside the executor's
    pieces."""
    wanted = {target.name: target for target in targets}
    if not wanted:
        return []
    # Steps that are not asked for stand in a file that is done: they have jobs only if a reduction of the whole model
    # must know them.
    steps = [
        step if step.name in wanted else replace(step, file=_DONE)
        for step in plan.steps
        if step.name in wanted or step.group is not None
    ]
    sink = _Cut(wanted, options, reader)
    beside = max(footprint(target, options) for target in targets)
    limit = max(plan.budget.tensors - beside, plan.budget.tensors // 2)
    with Tracer() as tracer:
        runner = Runner(plan.target.backend, plan.target.device)
        context = Context(runner, reader, tracer, NoProgress(), False, plan.keeps_cache)
        Executor(context, sink, plan.target.threads).run(batches(steps, plan.budget, {_DONE}), limit)
    return [sink.measured[target.name] for target in targets]


class _Cut:
    """Sink that gathers the difference of each tensor to the base, and cuts it when it is whole."""

    def __init__(self, wanted: Mapping[str, Target], options: ExtractOptions, reader: Reader) -> None:
        self.measured: dict[str, Measured] = {}
        self._wanted = wanted
        self._options = options
        self._reader = reader
        self._gathered: dict[str, tuple[Tensor, int]] = {}  # the difference, and how many elements are there

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Take the next rows of a tensor, in float32."""
        target = self._wanted[tensor_name]
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
                self.measured[tensor_name] = cut(target, self._options, list(_matrices(target, whole)))

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""


def _matrices(target: Target, whole: Tensor) -> Iterator[Delta]:
    for matrix in whole.view(target.count, *target.shape):
        yield Delta(target.shape, partial(_rows, matrix), held=True)


def _rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    return matrix[start:stop]
