"""Carries out the measuring of every tensor that a plan would merge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymerge.analysis.jobs import matrix, measure_step, spectrum_key, spectrum_steps
from pymerge.analysis.measures import Analysis, Spectrum, tensor_measures
from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.names import template
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.common.units import format_bytes
from pymerge.config.merge_config import participants
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.errors import ArgumentError, PlanError
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from pymerge.planner.budget import Budget


def survey(plan: Plan, spectra: int | None = 12, progress: ProgressSink | None = None) -> Analysis:
    """Measure the task vectors of every tensor that `plan` merges, on the CPU.

    Args:
        plan: of the merge that is being considered; its config must name a base.
        spectra: of how many linear weights singular values are computed, from every role and from first, middle and
            last blocks in turn; None for all. They cost as much as a merge by SVD would: d_out d_in min(d_out, d_in)
            flops a task and more.
        progress: told about the bytes read.

    Tensors in memory are within the plan's budget: as many pieces of 2^20 elements, or matrices with their Grams in
    float64, as there are threads and memory. Matrices that do not fit are left out and named.

    Raises:
        PlanError: the config has no base, slices or modules, or nothing is merged; or not a piece fits the budget.
        NonFiniteError: a model holds NaN or infinity; the message names file and tensor.
        CheckpointError: a file cannot be read.
    """
    if plan.config.base_model is None:
        raise PlanError([f"{plan.config.name}: task vectors are differences to a base; set base_model"])
    if form := next((form for form in ("slices", "modules") if getattr(plan.config, form)), None):
        raise PlanError(
            [f"{plan.config.place(form)}: a report is about whole models against one base; list them under 'models'"]
        )
    merged = [step for step in plan.steps if step.experts]
    if not merged:
        raise PlanError([f"{plan.config.name}: no tensor is merged; there is nothing to report"])
    if spectra is not None and spectra < 0:
        raise ArgumentError(f"spectra is {spectra}; give a number of weights, 0 for none")
    measured = [measure_step(step) for step in merged]
    _check_memory(measured, plan.budget)
    chosen = {step.name: (step, spectrum_steps(step)) for step in _spread(merged)[:spectra]}
    fitting = {name: steps for name, (step, steps) in chosen.items() if _peak(steps) <= plan.budget.host}
    found = _carry_out(plan, [*measured, *chain.from_iterable(fitting.values())], progress or NoProgress())
    return Analysis(
        tuple(plan.config.models[index].model for index in participants(plan.config, plan.method)),
        tuple(tensor_measures(step.name, step.role.kind.value, step.shape, found[step.name]) for step in measured),
        tuple(_spectrum(chosen[name][0], len(steps), found) for name, steps in fitting.items()),
        tuple(name for name in chosen if name not in fitting),
    )


def _check_memory(steps: Sequence[Step], budget: Budget) -> None:
    """Raise PlanError unless each piece that is measured fits the budget."""
    largest = max(steps, key=lambda step: _peak([step]))
    if (needed := _peak([largest])) > budget.host:
        need = format_bytes(needed, round_up=True)
        raise PlanError(
            [
                f"memory: measuring {largest.name!r} holds {need} of tensors at once, the limit is "
                f"{format_bytes(budget.host)} ({budget.origin}); give --memory {need} or more"
            ]
        )


def _peak(steps: Sequence[Step]) -> int:
    """Bytes that the largest piece of some steps takes."""
    return max(step.footprint(piece).peak for step in steps for piece in step.pieces)


def _carry_out(plan: Plan, steps: Sequence[Step], progress: ProgressSink) -> dict[str, Tensor]:
    """Numbers that the steps make, by their names; those of several pieces are added up."""
    queue = batches(steps, plan.budget)
    jobs = [job for batch in queue for job in batch.jobs]
    progress.start(sum(job.step.bytes_of(job.piece) + job.step.bytes_made(job.piece) for job in jobs))
    numbers = _Numbers()
    try:
        with Tracer() as tracer, Reader(plan.inputs.stamps) as reader:
            runner = Runner(plan.target.backend, plan.target.device)
            context = Context(runner, reader, tracer, progress, allow_nonfinite=False, keeps_cache=plan.keeps_cache)
            Executor(context, numbers, plan.target.threads).run(queue, plan.budget.host)
    finally:
        progress.close()
    return numbers.found


class _Numbers:
    """Sink that adds up vectors of float64 numbers, those of one name in their order."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Add the numbers of a piece."""
        assert isinstance(data, Tensor)
        total = self.found.setdefault(tensor_name, torch.zeros_like(data))
        total += data
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; there are none."""


def _spectrum(step: Step, tasks: int, found: dict[str, Tensor]) -> Spectrum:
    values = tuple(tuple(found[spectrum_key(step, task)].tolist()) for task in range(tasks))
    return Spectrum(step.name + ("[0]" if step.role.stacked else ""), matrix(step), values)


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
