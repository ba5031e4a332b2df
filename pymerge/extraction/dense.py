"""Merged tensors that are no products of factors: merged by the executor, and cut to a rank one after the other, or
kept whole."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import upcast
from pymerge.common.progress import NoProgress
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context, Sink
from pymerge.extraction.deltas import Delta
from pymerge.extraction.measure import Measured, cut, footprint
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import Target
from pymerge.ops._op import one_thread
from pymerge.output.layout import ShardLayout
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan

_DONE = ""  # no file of a plan
# A row that differs by less, as a share of each value, is the base's: an average of equal values.
_ROUNDING = 4 * 2.0**-23


def merge_and_cut(plan: Plan, targets: Sequence[Target], options: ExtractOptions, reader: Reader) -> list[Measured]:
    """Factors of the merged differences, in the order of the targets. Memory holds one of them beside the executor's
    pieces."""
    wanted = {target.name: target for target in targets}
    if not wanted:
        return []
    sink = _Cut(wanted, options, reader)
    _merge(plan, wanted, sink, reader, beside=max(footprint(target, options) for target in targets))
    return [sink.measured[target.name] for target in targets]


def merge_whole(plan: Plan, targets: Sequence[Target], options: ExtractOptions, reader: Reader) -> list[Measured]:
    """The merged tensors, as experts of their targets, in the order of these. Memory holds all of them."""
    if not targets:
        return []
    sink = _Whole({target.name: target.base.shape for target in targets})
    _merge(plan, sink.tensors, sink, reader, beside=sum(4 * target.base.numel for target in targets))
    return [_kept(target, sink.tensors[target.name], upcast(reader.read(target.base)).float()) for target in targets]


def _kept(target: Target, merged: Tensor, base: Tensor) -> Measured:
    delta = merged - base
    if target.tokens:
        others = torch.ones(len(delta), dtype=torch.bool)
        others[list(target.tokens)] = False
        if bool((delta[others].abs() <= _ROUNDING * base[others].abs()).all()):
            merged = merged[list(target.tokens)]
        else:  # the method has changed rows that no adapter has
            target = replace(target, tokens=())
    place = Path(f"merged {target.name}"), 0, merged.nbytes
    entry = HeldEntry(target.name, "F32", tuple(merged.shape), *place, tensor=merged)
    return Measured(replace(target, expert=entry), float(delta.double().square().sum()), 0.0)


def _merge(plan: Plan, wanted: Container[str], sink: Sink, reader: Reader, *, beside: int) -> None:
    """Have the executor merge some tensors; the sink holds `beside` bytes."""
    # Steps that are not asked for stand in a file that is done: they have jobs only if a reduction of the whole model
    # must know them.
    steps = [
        step if step.name in wanted else replace(step, file=_DONE)
        for step in plan.steps
        if step.name in wanted or step.group is not None
    ]
    limit = max(plan.budget.tensors - beside, plan.budget.tensors // 2)
    with Tracer() as tracer:
        runner = Runner(plan.target.backend, plan.target.device)
        context = Context(runner, reader, tracer, NoProgress(), False, plan.keeps_cache)
        Executor(context, sink, plan.target.threads).run(batches(steps, plan.budget, {_DONE}), limit)


def _values(data: Tensor | memoryview) -> Tensor:
    """What a sink is given, as one row of float32."""
    return torch.frombuffer(data, dtype=torch.float32) if isinstance(data, memoryview) else data.reshape(-1)


class _Whole:
    """Sink that keeps tensors in float32."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        self._there = dict.fromkeys(shapes, 0)

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Take the next rows of a tensor."""
        rows, first = _values(data), self._there[tensor_name]
        self.tensors[tensor_name].view(-1)[first : first + rows.numel()] = rows
        self._there[tensor_name] = first + rows.numel()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""


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
        rows = _values(data)
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
