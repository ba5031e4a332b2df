"""The typed parts of a config: models, slices, modules, rules for layers, dtypes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from pymerge.architecture.roles import Kind
from pymerge.config.settings import Setting

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


Regex = Annotated[StrictStr, AfterValidator(_regex)]
Dtype = Annotated[Literal["float32", "float16", "bfloat16", "float64"], BeforeValidator(_dtype)]


class Strict(BaseModel):
    """A mapping of the config: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(Strict):
    """One model of the merge: its folder, and parameters for it alone."""

    model: StrictStr = Field(min_length=1)
    parameters: dict[str, Setting] = Field(default_factory=dict)


def _layer_range(value: Any) -> Any:
    whole = isinstance(value, (list, tuple)) and all(type(bound) is int for bound in value)
    if not whole or len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise ValueError("two whole numbers, the first layer and the one behind the last, as in [0, 16]")
    return tuple(value)


class SourceEntry(ModelEntry):
    """One model of a slice, and which of its layers: from layer_range[0] to before layer_range[1].

    No layers in the first or last slice: only what stands before or behind all layers is taken from it.
    """

    layer_range: Annotated[tuple[int, int], BeforeValidator(_layer_range)]


class SliceEntry(Strict):
    """Layers of the output that are merged from as many layers of each source."""

    sources: tuple[SourceEntry, ...]
    base_model: Annotated[StrictStr, Field(min_length=1)] | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _equally_many(self) -> SliceEntry:
        counts = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(counts)) > 1:
            raise ValueError(
                f"of sources with equally many layers, not {' and '.join(map(str, counts))}; correct a layer_range"
            )
        return self


class ModuleEntry(Strict):
    """One tower of a model with several (vision_tower, text_decoder, ...): whole, or in slices."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[SliceEntry, ...] = ()
    parameters: dict[str, Setting] = Field(default_factory=dict)


class LayerRule(Strict):
    """Role of the tensors whose name `pattern` finds; it overrides what pymerge.architecture.roles would say."""

    pattern: Regex
    kind: Kind
    in_axis: Annotated[Literal[0, 1], BeforeValidator(_axis)] | None = None
    stacked: StrictBool | None = None
    split: Annotated[StrictInt, Field(ge=1)] | None = None  # equal parts along d_out, weights of their own

    @model_validator(mode="after")
    def _only_linear(self) -> LayerRule:
        given = (self.in_axis, self.stacked, self.split)
        if self.kind is not Kind.LINEAR and any(each is not None for each in given):
            raise ValueError("of kind 'linear' to have in_axis, stacked or split")
        return self
