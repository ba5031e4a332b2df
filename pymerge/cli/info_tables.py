"""Tables for people: the plan, the methods, the environment."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pymerge import env
from pymerge.architecture.roles import Layer
from pymerge.common.names import role
from pymerge.common.units import format_bytes, format_flops
from pymerge.methods import METHODS
from pymerge.methods.base import Parameter
from pymerge.methods.linear import element_count
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step


def plan_view(plan: Plan) -> RenderableType:
    """Inputs and totals, one row for the tensors that differ in block numbers only, the reasons, and warnings."""
    table = Table(title=f"{plan.method.name}: {plan.method.summary}", title_justify="left", pad_edge=False)
    for heading in ("tensors", "shape", "kind", "action", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("count", "read", "write", "compute"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for name, steps in _grouped(plan.steps).items():
        first = steps[0]
        table.add_row(
            Text(name),
            " x ".join(map(str, first.shape)) or "scalar",
            _kind(first.layer),
            first.action.label,
            first.dtype,
            str(len(steps)),
            format_bytes(sum(step.bytes_read for step in steps)),
            format_bytes(sum(step.nbytes for step in steps)),
            format_flops(sum(step.flops for step in steps)),
        )
        reasons.setdefault(role(first.layer.describe()), []).append(name)
    files = _count(len(plan.layouts), "file")
    largest = max(element_count(piece.shape) for step in plan.steps for piece in step.pieces)
    lines = [
        f"base    {plan.inputs.donor.path}",
        *(f"expert  {expert.path}" for expert in plan.inputs.experts),
        *plan.tokens.lines,
        f"{plan.tensors} tensors, {plan.parameters:,} parameters",
        f"read {format_bytes(plan.bytes_read)}, write {format_bytes(plan.bytes_written)} in {files}, "
        f"compute {format_flops(plan.flops)}",
        f"tensors held in memory at once: at most {format_bytes(plan.peak_memory)}, "
        f"the limit is {format_bytes(plan.budget.tensors)} ({plan.budget.origin})",
        f"reads {_count(plan.forecast.depth, 'piece')} ahead or more, of {_count(largest, 'element')} at most; files "
        f"{'stay in' if plan.keeps_cache else 'are dropped from'} the page cache",
    ]
    why = [f"{reason}: {', '.join(names)}" for reason, names in reasons.items()]
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*map(Text, lines), table, Text("What each tensor is, and why:"), *map(Text, why), *warnings)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _kind(layer: Layer) -> str:
    if not layer.solvable:
        return layer.kind.value
    return "stacked " * layer.stacked + layer.kind.value + " (transposed)" * (layer.in_axis == 0)


def _grouped(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Steps that are alike but for the block number, under their name with * for it."""
    groups: dict[str, dict[tuple[object, ...], list[Step]]] = {}
    for step in steps:
        name = role(step.name)
        reason = role(step.layer.describe())
        alike = groups.setdefault(name, {})
        alike.setdefault((step.shape, reason, step.action, step.dtype), []).append(step)
    return {
        name if len(kinds) == 1 else f"{name} ({members[0].name}, ...)": members
        for name, kinds in groups.items()
        for members in kinds.values()
    }


def methods_view() -> RenderableType:
    """All methods with their parameters and sources."""
    tables: list[RenderableType] = []
    for method in METHODS.values():
        table = Table(title=f"{method.name}: {method.summary} ({method.source})", title_justify="left", pad_edge=False)
        table.add_column("parameter")
        table.add_column("default")
        table.add_column("meaning")
        for parameter in method.parameters:
            table.add_row(parameter.name, _default(parameter), _meaning(parameter))
        tables.append(table)
    return Group(*tables)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return str(list(parameter.default)) if parameter.kind == "texts" else str(parameter.default)


def _meaning(parameter: Parameter) -> str:
    choices = f" ({' | '.join(parameter.choices)})" if parameter.choices else ""
    scope = "; for each model" if parameter.scope == "model" else ""
    return f"{parameter.summary}{choices}{scope}" + ("; accepted, has no effect" if parameter.no_effect else "")


def env_view() -> RenderableType:
    """Versions, devices, backends and environment variables."""
    import torch

    from pymerge.backends import describe, measured

    versions = Table("package", "version", title="versions", title_justify="left", pad_edge=False)
    for name, version in env.package_versions().items():
        versions.add_row(name, version)
    devices = Table("device", "what it is", title="devices", title_justify="left", pad_edge=False)
    devices.add_row("cpu", f"{env.machine_line()}; {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.add_row(f"cuda:{index}", f"{properties.name}, {format_bytes(properties.total_memory)}")
    backends = Table("backend", "works", "ops, or why not", title="backends", title_justify="left", pad_edge=False)
    for name, works, reason in describe():
        backends.add_row(name, "yes" if works else "no", Text(reason))
    variables = Table("variable", "meaning", title="environment variables", title_justify="left", pad_edge=False)
    for name, meaning in env.VARIABLES.items():
        variables.add_row(name, meaning)
    return Group(versions, devices, backends, Text(measured.summary()), variables)
