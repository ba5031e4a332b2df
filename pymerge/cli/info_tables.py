"""Tables for people: the methods, the environment."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pymerge import env
from pymerge.common.units import format_bytes
from pymerge.methods import METHODS
from pymerge.methods.base import PASSES, Parameter


def methods_view() -> RenderableType:
    """All methods with their parameters and sources."""
    tables: list[RenderableType] = []
    for method in METHODS.values():
        tables.append(_table(f"{method.name}: {method.summary} ({method.source})", method.parameters))
    passes = _table("passes: behind any method on task vectors, beside its own parameters", PASSES)
    return Group(*tables, passes)


def _table(title: str, parameters: Sequence[Parameter]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("parameter", "default", "meaning"):
        table.add_column(column)
    for parameter in parameters:
        table.add_row(parameter.name, _default(parameter), Text(_meaning(parameter)))
    return table


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

    from pymerge.backends import measured
    from pymerge.backends.runner import describe

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
