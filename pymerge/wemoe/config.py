"""The config of a build: a merge config for the static part, and the section `wemoe` for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pymerge.common.names import nearest
from pymerge.config.document import Document, show
from pymerge.config.entries import Regex
from pymerge.config.merge_config import MergeConfig, check_config, participants, read_config
from pymerge.config.references import same_model
from pymerge.errors import ConfigError
from pymerge.methods import get_method
from pymerge.wemoe.spec import RouterSpec, StorageSpec

KEY = "wemoe"
# Fields of wemoe.json's storage that a build finds out by itself.
_MEASURED = ("dense_bytes", "stored_bytes")


class BuildSettings(BaseModel):
    """The section `wemoe` of a config, with its defaults; docs/wemoe.md describes every key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    router: RouterSpec = RouterSpec()
    storage: StorageSpec = StorageSpec()
    modules: Regex | None = None
    architecture: Annotated[str, Field(min_length=1)] | None = None
    init_lambda: float = 0.3
    reduce: Literal["sample", "batch"] = "sample"
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0


def load_build_config(
    source: str | Path | Mapping[str, Any], *, directory: Path | None = None
) -> tuple[MergeConfig, BuildSettings]:
    """Read and check the config of a build.

    Args:
        source, directory: as of `pymerge.config.merge_config.load_config`.

    Returns:
        The merge of the static part, task arithmetic with `init_lambda` unless the config has a merge_method; and the
        section `wemoe`.

    Raises:
        ConfigError: with one line for each problem: file, line, value, and what to do.
    """
    document = read_config(source, directory=directory)
    section = BuildSettings()
    if isinstance(document.data, dict):
        section = _section(document.data.pop(KEY, None), document)
        _add_defaults(document.data, section)
    config = check_config(document)
    if config.base_model is None:
        raise ConfigError(f"{config.name}: 'base_model' is missing, and task vectors are differences from it; add it")
    if form := next((form for form in ("slices", "modules") if getattr(config, form)), None):
        raise ConfigError(
            f"{config.place(form)}: the layers of a WEMoE are those of its base and experts, and {form} put others "
            "together; list whole models under 'models'"
        )
    if config.tokenizer is not None:
        raise ConfigError(
            f"{config.place(config.tokenizer.key)}: task vectors need tables whose rows agree; give the models one "
            "vocabulary first, in merges of their own"
        )
    return config, section


def expert_names(config: MergeConfig) -> list[str]:
    """Names of the experts in their order: the last part of each model's path, or all of it where these are not
    different. The base, where a method lists it as a model, is no expert. Raises ConfigError for an expert that is
    listed twice, and where there is none."""
    chosen = [config.models[index].model for index in participants(config, get_method(config.merge_method))]
    models = [model for model in chosen if not same_model(model, config.base_model)]
    twice = next((model for number, model in enumerate(models) if model in models[:number]), None)
    if twice is not None:
        raise ConfigError(f"{config.name}: model {twice!r} is listed twice; list each expert once")
    if not models:
        raise ConfigError(f"{config.name}: models lists only the base; add the experts")
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else models


def _add_defaults(data: dict[str, Any], section: BuildSettings) -> None:
    """Task arithmetic, as W_0 + init_lambda sum_t tau_t, where the config names no method."""
    if "merge_method" in data:
        return
    data["merge_method"] = "task_arithmetic"
    parameters = data.setdefault("parameters", {})
    if isinstance(parameters, dict):
        parameters.setdefault("lambda", section.init_lambda)
        parameters.setdefault("weight", 1.0)


def _section(raw: Any, document: Document) -> BuildSettings:
    """The checked section; what is wrong goes to the document's problems."""
    if raw is None:
        return BuildSettings()
    if not isinstance(raw, dict):
        document.add((KEY,), f"{KEY} is {raw!r}; write its keys under it, or delete it")
        return BuildSettings()
    storage = raw.get("storage")
    for name in _MEASURED:
        if isinstance(storage, dict) and storage.pop(name, None) is not None:
            document.add((KEY, "storage", name), f"unknown key {name!r} in {KEY}.storage; delete it: it is measured")
    try:
        return BuildSettings.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            document.add((KEY, *detail["loc"]), _describe(detail))
    return BuildSettings()


def _describe(detail: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    location, value = (KEY, *detail["loc"]), detail["input"]
    if detail["type"] == "extra_forbidden":
        fields: dict[str, type[BaseModel]] = {"router": RouterSpec, "storage": StorageSpec}
        known = [name for name in fields.get(str(location[-2]), BuildSettings).model_fields if name not in _MEASURED]
        near = nearest(str(location[-1]), known)
        hint = f"did you mean {near!r}?" if near else "known keys: " + ", ".join(known)
        return f"unknown key {location[-1]!r} in {show(location[:-1])}; {hint}"
    if detail["type"] == "value_error" and isinstance(value, dict):
        return f"{show(location)}: {detail['ctx']['error']}; change or delete a key"
    reasons = {"literal_error": "expected", "value_error": "error"}
    reason = reasons.get(detail["type"])
    expected = f"must be {detail['ctx'][reason]}" if reason else detail["msg"].lower().replace("input should", "must")
    return f"{show(location)} is {value!r}; it {expected}"
