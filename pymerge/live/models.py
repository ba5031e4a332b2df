"""Base and experts of merges in memory, matched tensor by tensor as those of files are; steps for any parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from logging import WARNING
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from pymerge.architecture.roles import Kind, Role, classify, unused_rules
from pymerge.architecture.token_tables import rows_of
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.events import event
from pymerge.common.names import listed
from pymerge.config.merge_config import MergeConfig, load_config, resolve
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.live.checkpoints import hold
from pymerge.live.modules import Model, config_of, place_of, tensors_of
from pymerge.live.settings import Settings
from pymerge.methods import get_method
from pymerge.methods.actions import copy
from pymerge.methods.base import Method, Values
from pymerge.planner import pieces
from pymerge.planner.config_differences import check_configs
from pymerge.planner.constants import Constant, differing, find_constants
from pymerge.planner.decide import copies, decide
from pymerge.planner.inputs import open_inputs
from pymerge.planner.integers import check_integers
from pymerge.planner.layers import with_layers
from pymerge.planner.match import Section, match_tensors
from pymerge.planner.output_dtypes import output_dtypes
from pymerge.planner.routes import routed
from pymerge.planner.steps import Step
from pymerge.planner.tokens import align

# A module, tensors by name, or the name of a folder, file, Hub model or adapter.
Source: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
BASE = "the base"


def expert_name(number: int) -> str:
    """Name that messages have for an expert in memory."""
    return f"expert {number}"


@dataclass(frozen=True)
class Weight:
    """A tensor of the output: its role and section, the donor's entry, the dtype of the result."""

    name: str
    role: Role
    section: Section
    base: TensorEntry
    constant: Constant | None
    dtype: str  # code


class Models:
    """Models of a merge: matched once, and decided upon as often as parameters change.

    Args:
        base: the base, or None for methods that do without.
        experts: the experts, at least one.
        method: a name of `pymerge methods`.
        options: other keys of a config: layers, vocabulary, extra_tensors, missing_tensors, allow_nonfinite, dtype.

    Raises:
        PlanError: with everything that does not fit.
        ArgumentError, ConfigError, CheckpointError: a model, or an option, that cannot be had.
    """

    def __init__(
        self, base: Source | None, experts: Sequence[Source], method: str, options: Mapping[str, Any] | None = None
    ) -> None:
        if isinstance(experts, (str, Path, nn.Module)) or not isinstance(experts, Sequence):
            raise ArgumentError(f"experts is a {type(experts).__name__}; pass a list of models")
        if not experts:
            raise ArgumentError("no experts were given; pass at least one")
        self.method: Method = get_method(method).given(base is not None)
        if self.method.needs_base and base is None:
            raise ArgumentError(f"method {method!r} works on differences to a base, and base is None; pass the base")
        held: dict[str, Checkpoint] = {}
        names = [_name(expert_name(number), expert, held) for number, expert in enumerate(experts)]
        base_name = None if base is None else _name(BASE, base, held)
        if base_name in held:
            held[BASE], aliases = _without_aliases(held[BASE])
            held |= {name: _as_tied(each, aliases) for name, each in held.items() if name != BASE}
        self.count = len(experts)
        self.config = _config(method, self.method, base_name, names, options or {})
        self._held = held
        self._match()

    @property
    def device(self) -> str:
        """Device of the base, or of the first tensor that is in memory; the CPU for files."""
        held = (each for model in self._held.values() for each in model.tensors.values())
        return next((str(entry.tensor.device) for entry in held if isinstance(entry, HeldEntry)), "cpu")

    def bytes_shared(self, target: Model) -> int:
        """Bytes of the tensors of models that share memory with what is to be overwritten."""
        return sum(entry.nbytes for _, _, entry in self._shared(target))

    def copy_shared(self, target: Model) -> None:
        """Copy these tensors."""
        for owner, name, entry in list(self._shared(target)):
            model = self._held[owner]
            copied = replace(entry, tensor=entry.tensor.clone())
            self._held[owner] = replace(model, tensors={**model.tensors, name: copied})
        self._match()

    def _shared(self, target: Model) -> Iterator[tuple[str, str, HeldEntry]]:
        storages = {_storage(tensor) for tensor in tensors_of("the target", target).values()}
        for owner, model in self._held.items():
            for name, entry in model.tensors.items():
                if isinstance(entry, HeldEntry) and entry.numel and _storage(entry.tensor) in storages:
                    yield owner, name, entry

    def _match(self) -> None:
        inputs, config = open_inputs(self.config, self.method, self._held), self.config
        problems: list[str] = []
        donor = inputs.donor
        roles = classify(
            {name: (each.dtype, each.shape) for name, each in donor.tensors.items()}, donor.config, config.rules
        )
        problems += [
            f"layers: pattern {pattern!r} finds no tensor of {donor.path}; correct or delete it"
            for pattern in unused_rules(roles, config.rules)
        ]
        matched = match_tensors(inputs, roles, config, self.method, problems)
        if not problems:
            check_integers(matched, roles, config.rules, problems, matched.warnings)
        if problems:
            raise PlanError(problems)
        aligned = align(matched, roles, config, self.method)
        self.inputs, names, warnings = aligned.inputs, matched.names, matched.warnings
        constants = find_constants(self.inputs, names, roles, aligned.sections)
        warnings += differing(constants, donor.path)
        wanted = config.out_dtype or config.dtype
        dtypes = output_dtypes(
            self.inputs.donor, names, roles, constants, wanted, warnings, keep_float32=config.keep_float32
        )
        warnings += check_configs(aligned, roles, config, None)
        tensors = self.inputs.donor.tensors
        self.weights = tuple(
            Weight(name, roles[name], aligned.sections[name], tensors[name], constants.get(name), dtypes[name])
            for name in names
        )
        self.names = [weight.name for weight in self.weights if weight.role.kind is not Kind.BUFFER]
        self._sums: dict[str, Step] = {}  # steps of the last merge, of whole weights
        self.warnings = tuple(warnings)
        for warning in self.warnings:
            event("warning", warning, level=WARNING)

    def steps(self, settings: Settings) -> list[tuple[Step, ...]]:
        """Steps of all weights, in the order of `weights`: one step, of token tables one for rows that
        all models have and one for the others.

        Raises ConfigError, ArgumentError, which name the tensors, for parameters that do not fit them.
        """
        config = with_settings(self.config, settings)
        sections: dict[int, Section] = {}
        values: dict[int, Values] = {}  # of all tensors of a section, where they have the same
        found: list[tuple[Step, ...]] = []
        wrong: dict[str, list[str]] = {}
        for weight in self.weights:
            section = sections.get(id(weight.section))
            if section is None:
                section = sections[id(weight.section)] = replace(weight.section, config=config)
                if settings.same_for_all:
                    values[id(section)] = resolve(config, self.method, weight.name, 0.0, section.participants)
            try:
                found.append(tuple(self._steps(weight, section, values.get(id(section)))))
            except (ArgumentError, ConfigError) as error:
                wrong.setdefault(str(error), []).append(weight.name)
        if wrong:
            raise ArgumentError("; ".join(f"{listed(names)}: {message}" for message, names in wrong.items()))
        return _with_layers(found)

    def _steps(self, weight: Weight, section: Section, values: Values | None) -> Iterator[Step]:
        made = decide(section, self.method, weight.name, weight.role, weight.base, weight.constant, values)
        if (known := self._sums.get(weight.name)) is not None and known.does_like(made.action, made.experts):
            yield known.by(made.action)
            return
        for rows in rows_of(weight.base, made.experts):
            action = routed(made.action, made.role, rows.base, rows.experts) if rows.experts else copy()
            shape = rows.base.shape
            step = Step(
                name=weight.name,
                role=made.role,
                action=action,
                shape=shape,
                dtype=weight.dtype,
                base=rows.base,
                experts=rows.experts,
                reads_base=made.reads_base or copies(action),
                file="",
                offset=rows.start,
                nbytes=math.prod(shape) * ITEM_SIZES[weight.dtype],
                pieces=tuple(pieces.split(made.role, action, shape, max(1, math.prod(shape)))),
                values=made.values,
                infinite=weight.constant.infinite if weight.constant is not None else 0,
            )
            if shape == weight.base.shape:
                self._sums[weight.name] = step
            yield step


def _with_layers(weights: Sequence[tuple[Step, ...]]) -> list[tuple[Step, ...]]:
    """The steps of weights, each with those that it is solved with."""
    steps = iter(with_layers([step for steps in weights for step in steps]))
    return [tuple(islice(steps, len(own))) for own in weights]


def with_settings(config: MergeConfig, settings: Settings) -> MergeConfig:
    """The config with these parameters."""
    models = tuple(
        entry.model_copy(update={"parameters": own}) for entry, own in zip(config.models, settings.models, strict=True)
    )
    return config.model_copy(update={"models": models, "parameters": settings.merge})


def _held(entry: TensorEntry) -> Tensor:
    assert isinstance(entry, HeldEntry)
    return entry.tensor


def _storage(tensor: Tensor) -> tuple[Any, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _name(owner: str, model: Source, held: dict[str, Checkpoint]) -> str:
    """The name of a model in the config; one that is in memory is added to `held`."""
    if isinstance(model, (str, Path)):
        return str(model)
    if not isinstance(model, (nn.Module, Mapping)):
        raise ArgumentError(f"{owner} is a {type(model).__name__}; pass a module, tensors by name, or a path")
    tensors = tensors_of(owner, model)
    if not tensors:
        raise ArgumentError(f"{owner} has no tensors; pass a module, tensors by name, or a path")
    held[owner] = hold(owner, tensors, config_of(model))
    return owner


def _without_aliases(base: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """The base with each tensor under its first name alone, and the first names of the others."""
    firsts: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, entry in base.tensors.items():
        first = firsts.setdefault(place_of(_held(entry)), name)
        if first != name:
            aliases[name] = first
    return replace(base, tensors={name: each for name, each in base.tensors.items() if name not in aliases}), aliases


def _as_tied(expert: Checkpoint, aliases: Mapping[str, str]) -> Checkpoint:
    """An expert without the names that the base has for tensors which are one, where they are one here too."""
    tensors = dict(expert.tensors)
    for alias, first in aliases.items():
        if alias in tensors and first in tensors and tensors[alias].same_bytes(tensors[first]):
            del tensors[alias]
        elif alias in tensors and first not in tensors:  # a file may have the other name alone
            tensors[first] = tensors.pop(alias)
    return replace(expert, tensors=tensors)


def _config(
    name: str, method: Method, base: str | None, experts: Sequence[str], options: Mapping[str, Any]
) -> MergeConfig:
    """The config of the models; parameters come later."""
    own = {"merge_method", "base_model", "models", "parameters", "slices", "modules", "output"}
    if refused := own & options.keys():
        raise ArgumentError(f"options: {sorted(refused)[0]!r} is no option of a merge in memory; leave it out")
    required = {each.name: each.default for each in method.parameters if each.required}
    raw = {"merge_method": name, "models": [{"model": expert} for expert in experts], "parameters": required}
    return load_config({**options, **raw, **({} if base is None else {"base_model": base})})
