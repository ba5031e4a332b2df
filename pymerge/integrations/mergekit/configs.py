"""mergekit's MergeConfiguration as a config of pymerge."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from pymerge.config.document import Document, Location, from_mapping, parse_yaml, show
from pymerge.methods import METHODS

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

NAME = "mergekit's config"
# YAML 1.1 has texts for these, and mergekit takes them for numbers where a parameter is one.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def document_of(config: MergeConfiguration, source: str | None, *, lenient: bool = False) -> Document:
    """The document of a config: its source, so that messages have its lines, where that says the same.

    Args:
        lenient: leave out, with a warning, parameters that the method does not have.
    """
    if source is not None and not lenient and _says(source, config):
        return parse_yaml(source, NAME)
    data = _plain(config)
    dropped = list(_drop_unknown(data, config.merge_method)) if lenient else []
    document = from_mapping(data, NAME)
    for location in dropped:
        document.warn(location, f"{show(location)} is left out: {config.merge_method!r} has no such parameter there")
    return document


def _says(source: str, config: MergeConfiguration) -> bool:
    """Whether a text is this very config."""
    try:
        return bool(type(config).model_validate(yaml.safe_load(source)) == config)
    except (yaml.YAMLError, ValueError, TypeError, RuntimeError):  # what mergekit's validators raise
        return False


def _plain(value: Any, *, numbers: bool = False) -> Any:
    """Models of pydantic as mappings, without what is not given; `numbers`: texts may be meant for numbers."""
    from mergekit.common import ModelReference

    if isinstance(value, ModelReference):
        return _reference(value)
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        parts = {name: inner for name, inner in value.items() if inner is not None}
        return {
            name: _plain(inner, numbers=(numbers or name == "parameters") and name != "filter")
            for name, inner in parts.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(inner, numbers=numbers) for inner in value]
    return float(value) if numbers and isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _reference(model: ModelReference) -> Any:
    """BASE, BASE@REVISION, BASE+ADAPTER; a mapping where more is said."""
    if model.override_architecture is None:
        return str(model)
    sides = {"model": str(model.model)} | ({"lora": str(model.lora)} if model.lora else {})
    return {**sides, "override_architecture": model.override_architecture}


def _drop_unknown(data: Any, method: str, location: Location = ()) -> Iterator[Location]:
    """Take out parameters that stand where the method has none of that name; yields their places."""
    if isinstance(data, list):
        for number, inner in enumerate(data):
            yield from _drop_unknown(inner, method, (*location, number))
    elif isinstance(data, dict):
        if isinstance(given := data.get("parameters"), dict):
            known = _parameters(method, of_model=location[-2:-1] in (("models",), ("sources",)))
            for name in [name for name in given if name not in known]:
                del given[name]
                yield (*location, "parameters", name)
        for name in [name for name in data if name != "parameters"]:
            yield from _drop_unknown(data[name], method, (*location, name))


def _parameters(method: str, *, of_model: bool) -> Collection[str]:
    """Names of a method's parameters: of those that one model may have, or of all. An unknown method is told later."""
    if method not in METHODS:
        return ()
    return {each.name for each in METHODS[method].all_parameters if each.scope == "model" or not of_model}
