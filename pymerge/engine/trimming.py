"""Thresholds that are of all weights of a model: found in passes over them before any is merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pymerge.checkpoint.reader import Reader
from pymerge.common.arrays import ArrayLike
from pymerge.common.dtypes import upcast
from pymerge.common.events import event
from pymerge.methods.actions import Run
from pymerge.methods.delta import SolveTrimmedByAll
from pymerge.methods.doge import kept_at_least
from pymerge.methods.rows import Rows
from pymerge.methods.selection import Magnitudes, Selection, magnitudes, passes_to_select
from pymerge.planner import pieces
from pymerge.planner.steps import Step

# Gives the tensors of a weight, some rows after the others, the same in each pass.
Load = Callable[[], Iterable[Rows]]


def thresholds_of(
    run: Run, loads: Sequence[Load], numel: int, share: float, tasks: int, *, double: bool
) -> list[float]:
    """The least magnitude that is kept of each task, of so many elements in all weights.

    Args:
        double: a tensor is float64: then magnitudes of all are compared as such.
    """
    if numel == 0:
        return [0.0] * tasks
    counts = [kept_at_least(share, numel)] * tasks
    selection = Selection(numel, counts, keys_only=True, double=double, of_model=double)
    for _ in range(passes_to_select(numel, [1] * tasks, double=double, of_model=double) if numel > 1 else 2):
        for load in loads:
            for rows in load():
                selection.add(rows.first, selection.count(run, Magnitudes.of(rows)))
        selection.end_pass()
    return magnitudes(selection.keys)


def with_thresholds(steps: Sequence[Step], run: Run, load: Callable[[Step], Iterable[Rows]]) -> Sequence[Step]:
    """The steps with the thresholds that they must be told; weights with the same action have the same."""
    groups: dict[tuple[SolveTrimmedByAll, int], list[Step]] = {}
    for step in steps:
        if isinstance(step.action, SolveTrimmedByAll) and step.action.kept_of_all is not None:
            groups.setdefault((step.action, len(step.experts)), []).append(step)
    told: dict[str, SolveTrimmedByAll] = {}
    for (action, tasks), group in groups.items():
        share = action.kept_of_all
        assert share is not None
        loads = [_loaded(load, step) for step in group if 0 not in step.shape]
        numel = sum(math.prod(step.shape) for step in group)
        double = any(entry.dtype == "F64" for step in group for entry in step.inputs)
        found = thresholds_of(run, loads, numel, share, tasks, double=double)
        told |= {step.name: action.knowing(found) for step in group}
        event("selected", f"found what is kept of {len(group)} weights together", weights=len(group))
    return [replace(step, action=told[step.name]) if step.name in told else step for step in steps] if told else steps


def rows_of(step: Step, reader: Reader) -> Iterable[Rows]:
    """The tensors of a step, read piece by piece."""

    def read(start: int, stop: int) -> list[ArrayLike]:
        return [upcast(reader.read(entry, start, stop)) for entry in step.inputs]

    for piece in pieces.ranges(step.shape):
        base, *experts = read(piece.start, piece.stop)
        yield Rows(base, experts, step.dtype)


def _loaded(load: Callable[[Step], Iterable[Rows]], step: Step) -> Load:
    return lambda: load(step)
