"""Tables of a plan's tensors: each one's action, the tensors that it is made from, its parameters after filters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pymerge.adapters.summed import of_sum
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.common.names import template
from pymerge.methods.base import PASSES, Parameter
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

_LINES = 40  # groups that are shown
_NAMES = 3  # names of each of them


def tensor_rows(plan: Plan) -> Iterator[dict[str, Any]]:
    """One JSON-able mapping for each step: name, shape, dtype, kind, method, action, inputs, parameters, file, worker,
    route.

    `inputs` are {model, tensor} in the order in which the action takes them, the base first for a method that has one,
    with `dequantised`, the format's name, where the values are made from codes, and `adapter`, as in "rank 8", where an
    adapter changes its base's;
    `parameters` are those of the method for this tensor, where there is one for each expert as a list, without what has
    no effect and with weights that follow from others; `worker` is "native", "torch" or "core"; `route` is "core"
    (solved by the factors of adapters), "tiles" (on rows) or "dense" (on whole matrices). A table of tokens can have
    two steps: rows that all models have, and others.
    """
    models = {file: checkpoint.path for checkpoint in plan.inputs.all for file in checkpoint.all_files}
    for step in plan.steps:
        yield {
            "name": step.name,
            "shape": list(step.shape),
            "dtype": step.dtype,
            "kind": step.role.describe(),
            "method": plan.method.name,
            "action": step.action.label,
            "inputs": [_input(models, each) for entry in step.inputs for each in of_sum(entry)],
            "parameters": _parameters(plan, step),
            "file": step.file,
            "worker": step.worker,
            "route": step.route,
        }


def _input(models: Mapping[Path, Path], entry: TensorEntry) -> dict[str, str]:
    file = entry.adapter_parts[0].file if entry.adapter_parts else entry.file
    found = {"model": str(models.get(file, file)), "tensor": entry.name}
    if isinstance(entry, DecodedEntry) and entry.adapter_parts:
        found["adapter"] = entry.decoder.kind
    return found | ({"dequantised": entry.decoded_from} if entry.decoded_from else {})


def plan_json(plan: Plan) -> str:
    """The plan as JSON: `summary`, `warnings` and `tensors` (see `tensor_rows`)."""
    whole = {"summary": plan.summary(), "warnings": list(plan.warnings), "tensors": list(tensor_rows(plan))}
    return json.dumps(whole, indent=2, ensure_ascii=False)


def tensor_view(plan: Plan) -> RenderableType:
    """A row for each tensor, for people."""
    table = Table(title=f"{plan.method.name}: {plan.method.summary}", title_justify="left", pad_edge=False)
    for heading in ("tensor", "action", "from", "parameters"):
        table.add_column(heading, overflow="fold")
    for row in tensor_rows(plan):
        table.add_row(Text(row["name"]), row["action"], Text(_inputs(row)), Text(_text(row["parameters"])))
    return table


def group_view(plan: Plan) -> RenderableType:
    """A line for the tensors that are made alike: from the same models, by the same parameters."""
    groups: dict[str, list[str]] = {}
    for row in tensor_rows(plan):
        models = " + ".join(_short(each["model"]) + _mark(each) for each in row["inputs"])
        text = f"{row['action']} of {models}" + (f", {_text(row['parameters'])}" if row["parameters"] else "")
        groups.setdefault(text, []).append(row["name"])
    lines = [f"{text}: {_count(names)}" for text, names in groups.items()]
    more = len(lines) - _LINES
    lines = [*lines[:_LINES], *([f"and {more} more such groups: --tensors or --json shows all"] if more > 0 else [])]
    return Group(Text("What each tensor gets:"), *map(Text, lines))


def _parameters(plan: Plan, step: Step) -> dict[str, Any]:
    if step.values is None:
        return {}
    values = plan.method.shown(step.values)
    given = {**values.merge, **{name: list(each) for name, each in values.model.items()}}
    return {p.name: given[p.name] for p in plan.method.all_parameters if _is_shown(p, given)}


def _is_shown(parameter: Parameter, given: dict[str, Any]) -> bool:
    """Whether a parameter says something: not those without effect, and passes that there are."""
    if parameter.name not in given or parameter.no_effect:
        return False
    if parameter.only_with is not None and parameter in PASSES:
        return bool(given[parameter.only_with[0]] == parameter.only_with[1])
    return parameter not in PASSES or given[parameter.name] != parameter.default


def _text(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in parameters.items())


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_number, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inputs(row: dict[str, Any]) -> str:
    """The models, with the tensor where it has another name there."""
    shown = (
        _short(each["model"]) + (f" {each['tensor']}" if each["tensor"] != row["name"] else "") + _mark(each)
        for each in row["inputs"]
    )
    return " + ".join(shown)


def _mark(found: dict[str, str]) -> str:
    adapter = f" (adapter, {found['adapter']})" if "adapter" in found else ""
    return adapter + (" (dequantised)" if "dequantised" in found else "")


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model


def _count(names: list[str]) -> str:
    patterns = list(dict.fromkeys(map(template, names)))
    more = f" and {len(patterns) - _NAMES} more kinds" if len(patterns) > _NAMES else ""
    counted = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    if len(names) == 1:
        return names[0]
    return f"{counted}, {', '.join(patterns[:_NAMES])}{more}"
