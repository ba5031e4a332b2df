"""Reads every tensor that a plan would merge, range by range, and measures its task vectors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, zip_longest
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from pymerge.adapters.summed import is_sum, of_sum
from pymerge.analysis.measures import Analysis, Spectrum, Sums, TensorMeasures
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import upcast
from pymerge.common.names import template
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.config.merge_config import participants
from pymerge.errors import ArgumentError, NonFiniteError, PlanError
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

# Elements of a range: in float32, with the differences of all tasks, some MiB a task.
_RANGE_ELEMENTS = 2**20
_AHEAD = 2  # ranges that are being read while one is measured
# Float64 matrices of a weight's size that singular values take: base and expert as read, their difference, the Gram.
_SPECTRUM_MATRICES = 4

Read = TypeVar("Read")


def survey(plan: Plan, spectra: int | None = 12, progress: ProgressSink | None = None) -> Analysis:
    """Measure the task vectors of every tensor that `plan` merges.

    Args:
        plan: of the merge that is being considered; its config must name a base.
        spectra: of how many linear weights singular values are computed, from every role and from first, middle and
            last blocks in turn; None for all. They cost as much as a merge by SVD would: d_out d_in min(d_out, d_in)
            flops a task and more.
        progress: told about the bytes read.

    Memory holds three ranges of 2^20 elements for each model, and one matrix with its Gram, in float64; matrices for
    which the plan's budget is too small are left out and named.

    Raises:
        PlanError: the config has no base, slices or modules, or nothing is merged.
        NonFiniteError: a model holds NaN or infinity; the message names file and tensor.
        CheckpointError: a file cannot be read.
    """
    if plan.config.base_model is None:
        raise PlanError([f"{plan.config.name}: task vectors are differences to a base; set base_model"])
    if form := next((form for form in ("slices", "modules") if getattr(plan.config, form)), None):
        raise PlanError(
            [f"{plan.config.place(form)}: a report is about whole models against one base; list them under 'models'"]
        )
    steps = [_apart(step) for step in plan.steps if step.experts]
    if not steps:
        raise PlanError([f"{plan.config.name}: no tensor is merged; there is nothing to report"])
    if spectra is not None and spectra < 0:
        raise ArgumentError(f"spectra is {spectra}; give a number of weights, 0 for none")
    chosen = _spread(steps)[:spectra]
    fitting = [step for step in chosen if _spectrum_bytes(step) <= plan.budget.host]
    progress = progress or NoProgress()
    progress.start(sum(_bytes(step) for step in [*steps, *fitting]))
    try:
        with Reader(plan.inputs.stamps) as reader:
            tensors = list(_measures(steps, reader, progress))
            found = [_spectrum(step, reader, progress) for step in fitting]
    finally:
        progress.close()
    names = tuple(plan.config.models[index].model for index in participants(plan.config, plan.method))
    left_out = tuple(step.name for step in chosen if step not in fitting)
    return Analysis(names, tuple(tensors), tuple(found), left_out)


def _apart(step: Step) -> Step:
    """The step with every expert for itself, where a weighted sum of adapters is read as one tensor."""
    return replace(step, experts=of_sum(step.experts[0])[1:]) if is_sum(step.experts[0]) else step


def _bytes(step: Step) -> int:
    return step.base.stored_bytes + sum(entry.stored_bytes for entry in step.experts)


def _measures(steps: Sequence[Step], reader: Reader, progress: ProgressSink) -> Iterator[TensorMeasures]:
    ranges = [(step, rows) for step in steps for rows in _ranges(step.shape)]

    def read(job: tuple[Step, tuple[int, int]]) -> list[Tensor]:
        step, rows = job
        return [_read(reader, entry, *rows) for entry in (step.base, *step.experts)]

    sums: Sums | None = None
    for (step, rows), tensors in zip(ranges, _ahead(ranges, read), strict=True):
        progress.tensor(step.name)
        sums = sums or Sums(len(step.experts))
        sums.add(tensors[0], tensors[1:])
        progress.advance(_bytes(step) * (rows[1] - rows[0]) // max(1, step.shape[0] if step.shape else 1))
        if not sums.finite:
            _raise_nonfinite(step, rows[0], tensors)
        if rows[1] == (step.shape[0] if step.shape else 1):
            yield sums.result(step.name, step.role.kind.value, step.shape)
            sums = None


def _ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of at most 2^20 elements, but at least one row."""
    rows = shape[0] if shape else 1
    each = max(1, _RANGE_ELEMENTS // max(1, math.prod(shape[1:])))
    yield from ((start, min(start + each, rows)) for start in range(0, max(rows, 1), each))


def _read(reader: Reader, entry: TensorEntry, start: int, stop: int) -> Tensor:
    return upcast(reader.read(entry, start, stop) if entry.shape else reader.read(entry))


def _raise_nonfinite(step: Step, start: int, tensors: Sequence[Tensor]) -> NoReturn:
    """Raise NonFiniteError, which names file and tensor if one of these rows, from `start` on, is not finite."""
    for entry, tensor in zip((step.base, *step.experts), tensors, strict=True):
        check_finite(entry, start, tensor, "repair the model first")
    raise NonFiniteError(f"{step.base.file}: the deltas of {step.name!r} are too large to be squared; check the models")


def _ahead(jobs: Iterable[Read], work: Callable[[Read], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Results of `work` in order, computed in a few threads some jobs ahead of their use."""
    waiting: deque[Future[list[Tensor]]] = deque()
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="pymerge-read") as pool:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _spread(steps: Sequence[Step]) -> list[Step]:
    """Linear weights in the order in which singular values are worth having: of every role the first, then the last,
    the middle one, and the others."""
    templates: dict[str, list[Step]] = {}
    for step in steps:
        if step.role.solvable:
            templates.setdefault(template(step.name), []).append(step)
    for members in templates.values():
        count = len(members)
        first = list(dict.fromkeys([0, count - 1, count // 2]))
        members[:] = [members[i] for i in [*first, *(i for i in range(count) if i not in first)]]
    rounds = zip_longest(*templates.values())
    return [step for step in chain.from_iterable(rounds) if step is not None]


def _matrix(step: Step) -> tuple[int, int]:
    """Shape of the weight, or of the first of a stack."""
    return step.shape[-2], step.shape[-1]


def _spectrum_bytes(step: Step) -> int:
    rows, columns = _matrix(step)
    return 8 * _SPECTRUM_MATRICES * rows * columns


def _spectrum(step: Step, reader: Reader, progress: ProgressSink) -> Spectrum:
    """Singular values by the eigenvalues of the smaller Gram, in float64: those below 1e-8 of the largest are noise."""
    progress.tensor(step.name)
    rows = (0, 1) if step.role.stacked else (0, step.shape[0])
    base = _read(reader, step.base, *rows).double()
    found = []
    for entry in step.experts:
        tau = (_read(reader, entry, *rows).double() - base).reshape(_matrix(step))
        gram = tau @ tau.mT if tau.shape[0] <= tau.shape[1] else tau.mT @ tau
        values = torch.linalg.eigvalsh(gram).clamp_(min=0.0).sqrt_().flip(0)
        found.append(tuple(values.tolist()))
        progress.advance(entry.stored_bytes)
    progress.advance(step.base.stored_bytes)
    return Spectrum(step.name + ("[0]" if step.role.stacked else ""), _matrix(step), tuple(found))
