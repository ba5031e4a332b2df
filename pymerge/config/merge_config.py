"""The config: YAML or a mapping, read into typed models. It is a superset of mergekit's format.

Nothing is ignored: an unknown key is an error that names its line and the nearest known key, and all problems
of a config are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from pymerge.architecture.roles import Rule
from pymerge.common.names import nearest
from pymerge.config.checks import Checker
from pymerge.config.document import Document, Location, from_mapping, parse_yaml, read_yaml_file, show
from pymerge.config.entries import Dtype, LayerRule, ModelEntry, ModuleEntry, SliceEntry, SourceEntry, Strict
from pymerge.config.references import same_model
from pymerge.config.settings import Setting
from pymerge.config.slices import check_parts
from pymerge.errors import ConfigError
from pymerge.methods.base import Method, Parameter, Values
from pymerge.tokenizers.settings import TokenizerSettings


class MergeConfig(Strict):
    """A config whose every key and value has been checked against its method. Made by `load_config`."""

    merge_method: StrictStr
    base_model: Annotated[StrictStr, Field(min_length=1)] | None = None
    models: tuple[ModelEntry, ...] = ()  # with slices or modules: every model of theirs, once
    slices: tuple[SliceEntry, ...] = ()
    modules: dict[str, ModuleEntry] = Field(default_factory=dict)
    parameters: dict[str, Setting] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    keep_float32: StrictBool = True  # of tensors that a 16-bit model keeps so, whatever the dtypes say
    layers: tuple[LayerRule, ...] = ()
    allow_nonfinite: StrictBool = False
    output: Literal["model", "adapter"] = "model"
    rank: StrictStr | StrictInt | StrictFloat | None = None  # of an adapter
    full_tensors: Literal["error", "save", "skip"] | None = None  # beside an adapter's factors
    extra_tensors: Literal["heads", "error", "ignore"] = "heads"
    missing_tensors: Literal["error", "base"] = "error"
    vocabulary: Literal["strict", "base"] = "strict"
    tokenizer: TokenizerSettings | None = None  # tokenizer_source is read into it too
    chat_template: StrictStr | None = None

    _document: Document = PrivateAttr(default_factory=lambda: Document("config"))

    @property
    def source_text(self) -> str:
        """The YAML that was read (for a mapping: the same as YAML)."""
        return self._document.text

    @property
    def name(self) -> str:
        """Name of the config in messages: its file, or "config"."""
        return self._document.name

    @property
    def directory(self) -> Path | None:
        """Folder of the config's file; None if it came from a mapping or a text."""
        return self._document.directory

    @property
    def warnings(self) -> tuple[str, ...]:
        """Remarks on entries without effect, one line each."""
        return tuple(self._document.report(self._document.warnings))

    def place(self, *location: str | int) -> str:
        """File and line of a key or item, as messages begin: "merge.yml:4"; without lines, where in the config."""
        line = self._document.line(location)
        return f"{self.name}:{line}" if line else f"{self.name}: {show(location)}"

    @property
    def named_base(self) -> str | None:
        """The base, of the first slice that has one if the config has none."""
        slices = [*self.slices, *(entry for module in self.modules.values() for entry in module.slices)]
        bases = [self.base_model, *(entry.base_model for entry in slices)]
        return next((base for base in bases if base is not None), None)

    @property
    def donor(self) -> str:
        """The model that gives config.json, tokenizer and the names of tensors."""
        return self.named_base or self.models[0].model

    def at(self, *location: str | int) -> str:
        """The place of a key or item, for messages: file, line, and path inside."""
        line = self._document.line(location)
        return f"{self.name}:{line}: {show(location)}" if line else f"{self.name}: {show(location)}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """`layers` as pymerge.architecture.roles.classify takes them."""
        return tuple(Rule(rule.pattern, rule.kind, rule.in_axis, rule.stacked, rule.split) for rule in self.layers)


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
    checker = Checker(document, (*MergeConfig.model_fields, "tokenizer_source"))
    raw = check_parts(checker.check(), checker, document)
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
    config: MergeConfig,
    method: Method,
    tensor_name: str,
    position: float,
    model_indices: Sequence[int],
    input_names: Sequence[str] | None = None,
) -> Values:
    """Parameter values of one tensor, with mergekit's precedence: the model's, the top level's, the default.

    Args:
        position: t in [0, 1] of the tensor's block (pymerge.architecture.roles.positions), for gradients.
        model_indices: the models that take part, in order (see `participants`).
        input_names: what each of these models calls the tensor, for filters of its parameters; default: the same.

    Raises:
        ConfigError: a required parameter has only filters, and none fits this tensor.
    """

    def one(parameter: Parameter, levels: Sequence[Mapping[str, Setting]], name: str, owner: str) -> Any:
        for level in levels:
            if parameter.name in level and (value := level[parameter.name].value(name, position)) is not None:
                return value
        if parameter.name in required:
            names = repr(parameter.name) + (f" or {parameter.instead!r}" if parameter.instead else "")
            raise ConfigError(
                f"{config._document.name}: no entry of {names}{owner} fits, and {method.name!r} needs one; "
                "add a last entry without filter"
            )
        return parameter.default

    merge, model = {}, {}
    entries = [config.models[i] for i in model_indices]
    names = input_names or [tensor_name] * len(entries)
    required = {parameter.name for parameter in method.required({})}
    for parameter in method.all_parameters:
        if parameter.scope == "merge":
            merge[parameter.name] = one(parameter, [config.parameters], tensor_name, "")
    required = {parameter.name for parameter in method.required({name: (value,) for name, value in merge.items()})}
    for parameter in method.all_parameters:
        if parameter.scope == "merge":
            continue
        model[parameter.name] = tuple(
            one(parameter, [entry.parameters, config.parameters], name, f" of model {entry.model!r}")
            for entry, name in zip(entries, names, strict=True)
        )
    return Values(merge, model)


def canonical(config: MergeConfig) -> dict[str, Any]:
    """JSON-able form for fingerprints: equal for equal configs, whatever their order and comments."""
    plain = config.model_dump(mode="json", exclude={"models", "slices", "modules", "parameters"})
    parts: dict[str, Any] = {"models": config.models, "parameters": config.parameters}
    parts |= {name: part for name in ("slices", "modules") if (part := getattr(config, name))}
    return dict(sorted((plain | {name: _canonical(part) for name, part in parts.items()}).items()))


def _canonical(part: Any) -> Any:
    if isinstance(part, Setting):
        return part.canonical()
    if isinstance(part, BaseModel):
        return {name: _canonical(value) for name, value in part if value not in (None, ())}
    if isinstance(part, Mapping):
        return {name: _canonical(part[name]) for name in sorted(part)}
    return [_canonical(item) for item in part] if isinstance(part, tuple) else part


_EXPECTED = {
    "string_type": "a text (put it in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "string_too_short": "a path",
}
_FIELDS: dict[str | int, type[BaseModel]] = {
    "models": ModelEntry,
    "sources": SourceEntry,
    "slices": SliceEntry,
    "modules": ModuleEntry,
    "layers": LayerRule,
}


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
        if value in ("auto", "same", "default") and location[-1] in ("dtype", "out_dtype"):
            expected += "; delete it to keep the dtypes of the base"
    elif kind == "value_error":
        expected = str(detail["ctx"]["error"])
    elif kind == "model_type" and isinstance(value, str) and around[-1:] in (("models",), ("sources",)):
        expected += f": write '- model: {value}'"
    elif kind == "tuple_type" and location[-1] in ("models", "sources"):
        expected += ": write '- model: ...' for each of them"
    verb = "" if kind == "value_error" and isinstance(value, dict) else f"is {value!r}; it "
    return f"{show(location)} {verb}must be {expected}"


def _hint(key: str, around: Location, method: Method | None) -> str:
    keys = [part for part in around if part in _FIELDS]
    fields = (_FIELDS[keys[-1]] if keys else MergeConfig).model_fields
    if around[:1] != ("layers",) and method and any(parameter.name == key for parameter in method.all_parameters):
        return f"it is a parameter of {method.name!r}: put it under 'parameters'"
    if near := nearest(key, [*fields, *(() if around else ("tokenizer_source",))]):
        return f"did you mean {near!r}?"
    if around and key in MergeConfig.model_fields:
        return "it belongs to the top level: indent it less"
    return "known keys: " + ", ".join(fields)
