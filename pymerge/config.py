"""The config: YAML or a mapping, read into typed models. It is a superset of mergekit's format.

Nothing is ignored: an unknown key is an error that names its line and the nearest known key, and all problems
of a config are reported together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)

from pymerge.config_checks import HUB_REFERENCE, PASSED_OVER, Checker, places, same_model
from pymerge.errors import CheckpointError, ConfigError
from pymerge.layers import Kind, Rule
from pymerge.methods.base import Method, Parameter, Values
from pymerge.settings import Setting
from pymerge.yaml_lines import Document, Location, from_mapping, nearest, parse_yaml, read_yaml_file, show

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return _DTYPES.get(name, name)


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from error
    return pattern


def _axis(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value  # True == 1, but is no axis


Dtype = Annotated[Literal["float32", "float16", "bfloat16", "float64"], BeforeValidator(_dtype)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Strict):
    """One model of the merge: its folder, and parameters for it alone."""

    model: StrictStr = Field(min_length=1)
    parameters: dict[str, Setting] = Field(default_factory=dict)


class LayerRule(_Strict):
    """What the tensors are whose name `pattern` finds; it overrides what pymerge.layers would say."""

    pattern: Annotated[StrictStr, AfterValidator(_regex)]
    kind: Kind
    in_axis: Annotated[Literal[0, 1], BeforeValidator(_axis)] | None = None
    stacked: StrictBool | None = None

    @model_validator(mode="after")
    def _only_linear(self) -> LayerRule:
        if self.kind is not Kind.LINEAR and (self.in_axis is not None or self.stacked is not None):
            raise ValueError("of kind 'linear' to have in_axis or stacked")
        return self


class MergeConfig(_Strict):
    """A config whose every key and value has been checked against its method. Made by `load_config`."""

    merge_method: StrictStr
    base_model: Annotated[StrictStr, Field(min_length=1)] | None = None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, Setting] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    layers: tuple[LayerRule, ...] = ()
    allow_nonfinite: StrictBool = False
    extra_tensors: Literal["heads", "error", "ignore"] = "heads"
    vocabulary: Literal["strict", "base"] = "strict"

    _document: Document = PrivateAttr(default_factory=lambda: Document("config"))

    @property
    def source_text(self) -> str:
        """The YAML that was read (for a mapping: the same as YAML)."""
        return self._document.text

    @property
    def name(self) -> str:
        """What messages call the config: its file, or "config"."""
        return self._document.name

    @property
    def directory(self) -> Path | None:
        """Folder of the config's file; None if it came from a mapping or a text."""
        return self._document.directory

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the config says without effect, one line each."""
        return tuple(self._document.report(self._document.warnings))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """`layers` as pymerge.layers.classify takes them."""
        return tuple(Rule(rule.pattern, rule.kind, rule.in_axis, rule.stacked) for rule in self.layers)


def load_config(source: str | Path | Mapping[str, Any], *, directory: Path | None = None) -> MergeConfig:
    """Read and check a config.

    Args:
        source: the path of a YAML file, a YAML text (a str with a line break), or a mapping.
        directory: where relative names of models are looked up first; default: the folder of the file.

    Raises:
        ConfigError: with one line for each problem: file, line, value, and what to do.
    """
    return check_config(read_config(source, directory=directory))


def read_config(source: str | Path | Mapping[str, Any], *, directory: Path | None = None) -> Document:
    """The document behind a config, its syntax checked and nothing else; arguments as of `load_config`."""
    if isinstance(source, Mapping):
        document = from_mapping(source, "config")
    elif isinstance(source, str) and "\n" in source:
        document = parse_yaml(source, "config")
    else:
        document = read_yaml_file(Path(source).expanduser())
    if directory is not None:
        document.directory = directory
    return document


def check_config(document: Document) -> MergeConfig:
    """The checked config of a document. Raises ConfigError, with problems that are noted there already."""
    if not isinstance(document.data, dict):
        document.add((), "the config is not a mapping; start with 'merge_method: ...' and 'models:'")
        document.finish()
    checker = Checker(document)
    raw = checker.check()
    config = None
    try:
        config = MergeConfig.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            document.add(detail["loc"], _describe(detail, checker.method))
    document.finish()
    if config is None:
        raise AssertionError("pydantic refused a config without saying why")
    config._document = document
    return config


def participants(config: MergeConfig, method: Method) -> tuple[int, ...]:
    """Indices of the models that are merged: all, less the base if the method works on task vectors."""
    return tuple(
        i
        for i, entry in enumerate(config.models)
        if not (method.needs_base and same_model(entry.model, config.base_model))
    )


def resolve(
    config: MergeConfig, method: Method, tensor_name: str, position: float, model_indices: Sequence[int]
) -> Values:
    """Parameter values of one tensor, with mergekit's precedence: the model's, the top level's, the default.

    Args:
        position: t in [0, 1] of the tensor's block (pymerge.layers.positions), for gradients.
        model_indices: the models that take part, in order (see `participants`).

    Raises:
        ConfigError: a required parameter has only filters, and none fits this tensor.
    """

    def one(parameter: Parameter, levels: Sequence[Mapping[str, Setting]], owner: str) -> Any:
        for level in levels:
            if parameter.name in level and (value := level[parameter.name].value(tensor_name, position)) is not None:
                return value
        if parameter.required:
            raise ConfigError(
                f"{config._document.name}: no entry of {parameter.name!r}{owner} fits, and {method.name!r} needs one; "
                "add a last entry without filter"
            )
        return parameter.default

    merge, model = {}, {}
    for parameter in method.parameters:
        if parameter.scope == "merge":
            merge[parameter.name] = one(parameter, [config.parameters], "")
            continue
        entries = [config.models[i] for i in model_indices]
        model[parameter.name] = tuple(
            one(parameter, [entry.parameters, config.parameters], f" of model {entry.model!r}") for entry in entries
        )
    return Values(merge, model)


def model_path(config: MergeConfig, name: str) -> Path:
    """Folder of a model: a relative name is looked up beside the config, then in the working directory.

    Raises:
        CheckpointError: there is nothing by that name.
    """
    tried = places(name, config.directory)
    for path in tried:
        if os.path.exists(path):  # not Path.exists, which raises OSError for names that are too long
            return path
    raise CheckpointError(
        f"{config._document.name}: model {name!r} not found: no {' and no '.join(map(str, tried))}; "
        "correct the path, or download the model to a folder first"
    )


def hub_reference(config: MergeConfig, name: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name` or `org/name@revision`; None for anything else.

    Where the path exists, or a folder of its first part, the name is meant for a path: nothing is looked for elsewhere.
    """
    found = HUB_REFERENCE.fullmatch(name)
    folder = name.partition("/")[0]
    if found is None or any(path.exists() for path in places(folder, config.directory)):
        return None
    return found["repository"], found["revision"]


def canonical(config: MergeConfig) -> dict[str, Any]:
    """JSON-able form for fingerprints: equal for equal configs, whatever their order and comments."""

    def settings(parameters: Mapping[str, Setting]) -> dict[str, Any]:
        return {name: parameters[name].canonical() for name in sorted(parameters)}

    plain = config.model_dump(mode="json", exclude={"models", "parameters"})
    plain["models"] = [{"model": e.model, "parameters": settings(e.parameters)} for e in config.models]
    plain["parameters"] = settings(config.parameters)
    return dict(sorted(plain.items()))


_EXPECTED = {
    "string_type": "a text (put it in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "string_too_short": "a path",
}
_FIELDS: dict[str | int, type[BaseModel]] = {"models": ModelEntry, "layers": LayerRule}


def _describe(detail: Mapping[str, Any], method: Method | None) -> str:
    """One of pydantic's errors in our words."""
    kind, location, value = detail["type"], detail["loc"], detail["input"]
    around = location[:-1]
    inside = f" in {show(around)}" if around else ""
    if kind == "extra_forbidden":
        return f"unknown key {location[-1]!r}{inside}; {_hint(str(location[-1]), around, method)}"
    if kind == "missing":
        return f"{location[-1]!r} is missing{inside}; add '{location[-1]}: ...'"
    expected = _EXPECTED.get(kind, detail["msg"])
    if kind in ("literal_error", "enum"):
        expected = detail["ctx"]["expected"]
    elif kind == "value_error":
        expected = str(detail["ctx"]["error"])
    verb = "" if kind == "value_error" and isinstance(value, dict) else f"is {value!r}; it "
    return f"{show(location)} {verb}must be {expected}"


def _hint(key: str, around: Location, method: Method | None) -> str:
    fields = (_FIELDS[around[0]] if around else MergeConfig).model_fields
    if around[:1] != ("layers",) and method and any(parameter.name == key for parameter in method.parameters):
        return f"it is a parameter of {method.name!r}: put it under 'parameters'"
    if near := nearest(key, [*fields, *(() if around else PASSED_OVER)]):
        return f"did you mean {near!r}?"
    if around and key in MergeConfig.model_fields:
        return "it belongs to the top level: indent it less"
    return "known keys: " + ", ".join(fields)
