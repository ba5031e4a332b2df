"""A parameter's value in a config: a number, a gradient over the layers, or a list of values with filters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymerge.common.names import nearest
from pymerge.config.document import Document, Location, show
from pymerge.errors import ArgumentError
from pymerge.methods.base import Parameter


@dataclass(frozen=True)
class Gradient:
    """Knots at equal distances over [0, 1], with straight lines between them."""

    knots: tuple[float, ...]

    def at(self, position: float) -> float:
        """The value at `position` in [0, 1]."""
        scaled = position * (len(self.knots) - 1)
        left = min(int(scaled), len(self.knots) - 1)
        right = min(left + 1, len(self.knots) - 1)
        share = scaled - left
        return (1.0 - share) * self.knots[left] + share * self.knots[right]


@dataclass(frozen=True)
class Entry:
    """A value and the tensors that it is for: those whose name contains `filter`; all if it is None."""

    value: Any
    filter: str | None = None


@dataclass(frozen=True)
class Setting:
    """Values of one parameter in a config; the first entry whose filter fits a tensor counts.

    Semantics are mergekit's: filters are case-sensitive substrings, "*" fits all, and where no entry fits,
    the next level is asked (the model's parameters, then the top-level ones, then the method's default).
    """

    entries: tuple[Entry, ...]

    def value(self, tensor: str, position: float) -> Any:
        """The value for this tensor; None if no filter fits."""
        for entry in self.entries:
            if entry.filter is None or entry.filter in tensor:
                return entry.value.at(position) if isinstance(entry.value, Gradient) else entry.value
        return None

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of all entries."""
        return tuple(entry.value for entry in self.entries)

    def canonical(self) -> Any:
        """JSON-able form, the same for settings that mean the same."""
        forms = [{"filter": entry.filter, "value": _canonical(entry.value)} for entry in self.entries]
        return forms[0]["value"] if self.entries[0].filter is None else forms


def _canonical(value: Any) -> Any:
    if isinstance(value, Gradient):
        return list(value.knots) if len(set(value.knots)) > 1 else value.knots[0]
    return list(value) if isinstance(value, tuple) else value


def parse_setting(raw: Any, parameter: Parameter, location: Location, document: Document) -> Setting | None:
    """Read a setting of `parameter`; what is wrong goes to the document's problems (then None)."""
    before = len(document.problems)
    if parameter.kind == "layer_scale" and isinstance(raw, dict) and "value" not in raw:
        entries = [Entry(_scalar(raw, parameter, location, document))]
    elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        entries = [_entry(item, parameter, (*location, i), document) for i, item in enumerate(raw)]
    elif isinstance(raw, dict):
        entries = [_entry(raw, parameter, location, document)]
    else:
        entries = [Entry(_value(raw, parameter, location, document))]
    return Setting(tuple(entries)) if len(document.problems) == before else None


def unreachable(setting: Setting) -> int | None:
    """Number of the first entry that stands behind one for all tensors, if there is one."""
    first = next((i for i, entry in enumerate(setting.entries) if entry.filter is None), len(setting.entries))
    return first + 1 if first + 1 < len(setting.entries) else None


def _entry(raw: Any, parameter: Parameter, location: Location, document: Document) -> Entry:
    if not isinstance(raw, dict):
        document.add(location, f"{show(location)} is {raw!r}; beside entries with filters it must be 'value: {raw}'")
        return Entry(None)
    for key in raw:
        if key not in ("value", "filter"):
            near = nearest(key, ("value", "filter"))
            hint = f"did you mean {near!r}?" if near else "an entry has 'value' and 'filter'"
            document.add((*location, key), f"unknown key {key!r} in {show(location)}; {hint}")
    filter_ = raw.get("filter")
    if filter_ is not None and not isinstance(filter_, str):
        document.add((*location, "filter"), f"{show(location)}.filter is {filter_!r}; it must be a text: quote it")
    if "value" not in raw:
        document.add(location, f"{show(location)} has no 'value'; add one")
        return Entry(None)
    value = _value(raw["value"], parameter, (*location, "value"), document)
    return Entry(value, None if filter_ == "*" else filter_)


def _value(raw: Any, parameter: Parameter, location: Location, document: Document) -> Any:
    """A scalar, or a gradient if the parameter is a number; None and a problem if it is neither."""
    if raw is None:
        document.add(location, f"{show(location)} is empty; give it a value or delete it")
        return None
    if not isinstance(raw, list) or parameter.kind in ("texts", "layer_scale"):
        return _scalar(raw, parameter, location, document)
    if parameter.kind not in ("number", "number_or_auto"):
        document.add(
            location,
            f"{show(location)} is a list; {parameter.name!r} cannot change over layers: give one value",
        )
        return None
    if not raw:
        document.add(location, f"{show(location)} is an empty list; give it a number, or delete it")
        return None
    knots = [_scalar(knot, parameter, (*location, i), document) for i, knot in enumerate(raw)]
    if None in knots:
        return None
    if not all(isinstance(knot, float) and math.isfinite(knot) for knot in knots):
        document.add(
            location, f"{show(location)} is a gradient; write finite numbers only, or one value that is no list"
        )
        return None
    return Gradient(tuple(knots))


def _scalar(raw: Any, parameter: Parameter, location: Location, document: Document) -> Any:
    try:
        return parameter.parse(raw)
    except ArgumentError as error:
        document.add(location, f"{show(location)}: {error}")
    return None


def parse_settings(
    raw: Mapping[str, Any], parameters: Mapping[str, Parameter], location: Location, document: Document
) -> dict[str, Setting]:
    """Read the settings of those names that `parameters` knows, in the order of the config."""
    settings = {}
    for name, value in raw.items():
        if name in parameters and (setting := parse_setting(value, parameters[name], (*location, name), document)):
            settings[name] = setting
    return settings
