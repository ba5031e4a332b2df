"""Table of a plan for people: inputs, totals, and a row for the tensors that are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pymerge.adapters.summed import of_sum
from pymerge.architecture.roles import Role
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.common.names import template
from pymerge.common.units import count_of, format_bytes, format_flops
from pymerge.planner.data import folders, setting
from pymerge.planner.fit import pinned_bytes
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

_NAMES = 3  # of tensors that PyTorch carries out


def plan_view(plan: Plan) -> RenderableType:
    """Inputs and totals, one row for the tensors that differ in block numbers only, the reasons, and warnings.

    Where experts are adapters, the rows say which route is taken (pymerge.planner.routes).
    """
    table = Table(title=f"{plan.method.name}: {plan.method.summary}", title_justify="left", pad_edge=False)
    for heading in ("tensors", "shape", "kind", "action", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("count", "read", "write", "compute"):
        table.add_column(heading, justify="right", no_wrap=True)
    adapters = any(_adapted(step) for step in plan.steps)
    if adapters:
        table.add_column("route", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for name, steps in _grouped(plan.steps).items():
        first = steps[0]
        table.add_row(
            Text(name),
            " x ".join(map(str, first.shape)) or "scalar",
            _kind(first.role),
            first.action.label + _marks(first),
            first.dtype,
            str(len(steps)),
            format_bytes(sum(step.bytes_read for step in steps)),
            format_bytes(sum(step.nbytes for step in steps)),
            format_flops(sum(step.flops for step in steps)),
            *([first.route] if adapters else []),
        )
        reasons.setdefault(template(first.role.describe()), []).append(name)
    files = count_of(len(plan.files), "file")
    largest = max(math.prod(piece.shape) for step in plan.steps for piece in step.pieces)
    lines = [
        f"base    {plan.inputs.donor.path}",
        *(f"expert  {expert.path}{_applied(expert)}" for expert in plan.inputs.experts),
        *_data(plan),
        *plan.tokens.lines,
        f"{plan.tensors} tensors, {plan.parameters:,} parameters",
        f"read {format_bytes(plan.bytes_read)}, write {format_bytes(plan.bytes_written)} in {files}, "
        f"compute {format_flops(plan.flops)}",
        f"tensors held in memory at once: at most {format_bytes(plan.peak_memory)}, "
        f"the limit is {format_bytes(plan.budget.tensors)} ({plan.budget.origin})",
        *_pinned(plan),
        f"reads {count_of(plan.forecast.depth, 'piece')} ahead or more, of {count_of(largest, 'element')} at most; "
        f"files {'stay in' if plan.keeps_cache else 'are dropped from'} the page cache",
        _workers(plan),
    ]
    why = [f"{reason}: {', '.join(names)}" for reason, names in reasons.items()]
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*map(Text, lines), table, Text("What each tensor is, and why:"), *map(Text, why), *warnings)


def _data(plan: Plan) -> list[str]:
    """Lines on data that models are run over, and on what that takes."""
    if not plan.method.needs_data or not (given := folders(plan.steps)):
        return []
    samples = count_of(setting(plan.steps, "samples"), "sample")
    grams = sum(getattr(step.action, "bytes_beside", 0) for step in plan.steps)
    return [
        *(f"data    {folder}, the first {samples}" for folder in given),
        f"Grams of these, {format_bytes(grams)}, stay in the output's work folder until it is whole; in memory, beside "
        "the tensors below: the weights of one block and those in none, and the hidden states of all samples",
    ]


def _pinned(plan: Plan) -> list[str]:
    """Line on memory of the host for a merge on CUDA."""
    if plan.target.device.type != "cuda":
        return []
    pinned = format_bytes(pinned_bytes(plan.steps, plan.budget))
    return [f"pinned on the host for copies: {pinned}, the limit is {format_bytes(plan.budget.host)}"]


def _workers(plan: Plan) -> str:
    """Line on what carries out the tensors: native code, or PyTorch, which is imported only if it does any."""
    by_torch = [name for name, steps in _grouped(plan.steps).items() if steps[0].worker != "native"]
    if not by_torch:
        return "carried out by native code, without PyTorch"
    more = len(by_torch) - _NAMES
    names = ", ".join(by_torch[:_NAMES]) + (f" and {more} more" if more > 0 else "")
    native = len(by_torch) < len(_grouped(plan.steps))
    return f"carried out by {'native code, and by ' if native else ''}PyTorch{f': {names}' if native else ''}"


def _kind(role: Role) -> str:
    if not role.solvable:
        return role.kind.value
    return "stacked " * role.stacked + role.kind.value + " (transposed)" * (role.in_axis == 0)


def _marks(step: Step) -> str:
    """Marks of a step that reads special values, or is solved with others."""
    entries = [each for entry in step.inputs for each in of_sum(entry)]
    ranks = [entry.decoder.kind for entry in entries if isinstance(entry, DecodedEntry) and entry.adapter_parts]
    adapters = f", {count_of(len(ranks), 'adapter')}, {max(ranks)}" if ranks else ""
    together = f", by what {count_of(len(step.layers.steps), 'weight')} tell together" if step.layers else ""
    return adapters + (", dequantised" if _decoded(step) else "") + together


def _applied(expert: Checkpoint) -> str:
    """Model that an expert is applied to, if it is an adapter."""
    return f" (adapter, on {expert.base.path})" if expert.base is not None else ""


def _decoded(step: Step) -> bool:
    """Whether a step reads a tensor whose values are made from codes."""
    return any(entry.decoded_from for entry in step.inputs)


def _adapted(step: Step) -> bool:
    """Whether an expert of a step is made from factors."""
    return any(entry.adapter_parts for entry in step.experts)


def _grouped(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Steps that are alike but for the block number, under their name with * for it."""
    groups: dict[str, dict[tuple[object, ...], list[Step]]] = {}
    for step in steps:
        name = template(step.name)
        reason = template(step.role.describe())
        alike = groups.setdefault(name, {})
        key = (step.shape, reason, step.action, step.dtype, step.worker, step.route, _marks(step))
        alike.setdefault(key, []).append(step)
    return {
        name if len(kinds) == 1 else f"{name} ({members[0].name}, ...)": members
        for name, kinds in groups.items()
        for members in kinds.values()
    }
