"""A model's folder beyond its transformer: modules of sentence-transformers, merged by the same config, and what else
lies there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pymerge.architecture.roles import Role, Rule, classify, positions
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.sentence_modules import MODULES_FILE, Module
from pymerge.common.names import first_few
from pymerge.config.merge_config import MergeConfig
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs
from pymerge.planner.integers import check_integers
from pymerge.planner.match import Section, match_tensors

Value = TypeVar("Value")

# Modules without weights that may stand anywhere: an output without them gives the same directions.
_HARMLESS = ("Normalize", "Dropout")
# Modules whose config.json is that of a model of transformers.
_TRANSFORMERS = ("Transformer", "MLMTransformer", "CLIPModel")
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_RENAMED = {"word_embedding_dimension": "embedding_dimension"}


@dataclass(frozen=True)
class FolderInputs:
    """Inputs of the output's files in one folder: `inputs` under the donor's names, which tensors are
    written, in the donor's order, their roles and sections."""

    folder: str
    inputs: Inputs
    names: list[str]
    roles: Mapping[str, Role]
    sections: Mapping[str, Section]

    def full_name(self, name: str) -> str:
        """A name of the folder among those of all: with the folder before it, where there is one."""
        return f"{self.folder}/{name}" if self.folder else name

    def whole(self) -> Whole:
        """This part alone as the whole output."""
        donor = self.inputs.donor
        if not self.folder:
            return Whole(self.names, self.roles, donor.tensors, self.sections)
        renamed: dict[int, Section] = {}
        for section in self.sections.values():
            if id(section) not in renamed:
                experts = (replace(expert, tensors=self._full(expert.tensors)) for expert in section.experts)
                places = self._full(section.positions)
                copied = frozenset(map(self.full_name, section.copied))
                renamed[id(section)] = replace(section, experts=tuple(experts), positions=places, copied=copied)
        sections = {name: renamed[id(section)] for name, section in self.sections.items()}
        names = [self.full_name(name) for name in self.names]
        return Whole(names, self._full(self.roles), self._full(donor.tensors), self._full(sections))

    def _full(self, found: Mapping[str, Value]) -> dict[str, Value]:
        return {self.full_name(name): value for name, value in found.items()}


@dataclass(frozen=True)
class Whole:
    """All tensors of an output under full names: the donor's, with their roles and sections; `names` are written."""

    names: list[str]
    roles: Mapping[str, Role]
    tensors: Mapping[str, TensorEntry]
    sections: Mapping[str, Section]


def joined(main: FolderInputs, modules: Sequence[FolderInputs]) -> Whole:
    """The output of a transformer and its modules."""
    if not modules:
        return main.whole()
    parts = [part.whole() for part in (main, *modules)]
    return Whole(
        [name for part in parts for name in part.names],
        {name: role for part in parts for name, role in part.roles.items()},
        {name: entry for part in parts for name, entry in part.tensors.items()},
        {name: section for part in parts for name, section in part.sections.items()},
    )


def match_modules(
    inputs: Inputs, config: MergeConfig, method: Method, problems: list[str], warnings: list[str]
) -> list[FolderInputs]:
    """The donor's modules that have weights, each held against those of the experts, as the transformers are.

    With slices or towers, which say nothing of modules, they are the donor's. What does not fit is added to `problems`.
    """
    donor = inputs.donor
    if not donor.parts:
        return []
    experts = [expert for expert in inputs.all if expert.path != donor.path]
    before = len(problems)
    for expert in experts:
        if expert.parts:
            problems += _unlike(donor, expert)
        elif donor.modules:
            text = (
                f"{expert.path}: has no {MODULES_FILE}, and {donor.path} has weights in {first_few(donor.modules)} too"
            )
            if config.missing_tensors == "base":
                warnings.append(f"{text}: those stand for its own (missing_tensors: base)")
            else:
                problems.append(
                    f"{text}; save it with sentence-transformers, with the same modules, or set missing_tensors: base "
                    "to take the base's in their place"
                )
    if len(problems) > before:
        return []
    parts = []
    for folder, module in donor.modules.items():
        roles = _classified(module, folder, config.rules)
        if config.slices or config.modules:
            sections = dict.fromkeys(roles, Section(config, (), (), positions(roles, module.config)))
            parts.append(FolderInputs(folder, Inputs(module, ()), list(module.tensors), roles, sections))
            warnings.append(f"{module.path}: is copied as it is: the config puts layers of transformers together")
            continue
        theirs = tuple(_module_of(expert, donor, folder) for expert in inputs.experts)
        own: list[str] = []
        alone = config.model_copy(update={"tokenizer": None})
        matched = match_tensors(Inputs(module, theirs), roles, alone, method, own)
        if not own:
            check_integers(matched, roles, config.rules, own, matched.warnings)
        problems += own
        warnings += matched.warnings
        parts.append(FolderInputs(folder, matched.inputs, matched.names, roles, matched.sections))
    return parts


def beside_warnings(inputs: Inputs) -> Iterator[str]:
    """Warnings about weight files that lie beside those that are merged."""
    donor = inputs.donor
    if copied := donor.beside.copied:
        yield f"{donor.path}: copied as they are, not merged: {first_few(map(str, copied), 8)}"
    for model in inputs.all:
        unused = list(model.beside.unused)
        if model.path != donor.path:
            unused += [file for file in model.beside.copied if file not in copied]
            if not donor.parts:
                unused += [file.relative_to(model.path) for each in model.modules.values() for file in each.files]
        if unused:
            taken = first_few((file.relative_to(model.path).as_posix() for file in model.files), 1)
            what = f"its weights are {taken}; beside them, and not used" if taken else "not used"
            yield f"{model.path}: {what}: {first_few(map(str, unused), 8)}"


def _classified(module: Checkpoint, folder: str, rules: Sequence[Rule]) -> dict[str, Role]:
    """Roles of a module's tensors, by their own names; rules are about full names."""
    described = {name: (entry.dtype, entry.shape) for name, entry in module.tensors.items()}
    roles = classify(described, module.config)
    if rules:
        whole = {f"{folder}/{name}": of for name, of in described.items()}
        by_rule = classify(whole, module.config, rules)
        for name in roles:
            full = f"{folder}/{name}"
            if any(re.search(rule.pattern, full) for rule in rules):
                roles[name] = by_rule[full]
    return roles


def _module_of(expert: Checkpoint, donor: Checkpoint, folder: str) -> Checkpoint:
    """The expert's module at the place of the donor's in that folder; the donor's, if the expert has no modules."""
    if not expert.parts:
        return donor.modules[folder]
    ours, theirs = _decisive(donor), _decisive(expert)
    number = next(number for number, module in enumerate(ours) if module.folder == folder)
    return expert.modules[theirs[number].folder]


def _decisive(model: Checkpoint) -> list[Module]:
    return [module for module in model.parts if module.kind not in _HARMLESS]


def _unlike(donor: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    """Difference of the modules of an expert to those of the donor."""
    ours, theirs = _decisive(donor), _decisive(expert)
    if [module.kind for module in ours] != [module.kind for module in theirs]:
        kinds = [", ".join(module.kind for module in each) for each in (theirs, ours)]
        yield (
            f"{expert.path}/{MODULES_FILE}: lists {kinds[0]}, that of {donor.path} {kinds[1]}; "
            "merge models of the same modules"
        )
        return
    for our, their in zip(ours, theirs, strict=True):
        if our.folder in donor.modules and their.folder not in expert.modules:
            yield f"{expert.path / their.folder}: has no weights of its own; download the whole model again"
        yield from _unlike_configs(donor, our, expert, their)


def _unlike_configs(donor: Checkpoint, our: Module, expert: Checkpoint, their: Module) -> Iterator[str]:
    if our.kind in _TRANSFORMERS:
        return
    wanted, found = _plain(our), _plain(their)
    for key in wanted.keys() & found.keys():
        if wanted[key] != found[key] and None not in (wanted[key], found[key]):
            yield (
                f"{expert.path / their.folder}/config.json: {key} is {found[key]!r}, in {donor.path / our.folder} it "
                f"is {wanted[key]!r}; merge models whose {our.kind} modules are alike"
            )


def _plain(module: Module) -> dict[str, Any]:
    """A module's config, whichever version of sentence-transformers has written it."""
    config = {_RENAMED.get(key, key): value for key, value in module.config.items() if not key.startswith("_")}
    if module.kind != "Pooling":
        return config
    modes = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)]
    config = {key: value for key, value in config.items() if key not in _POOLING_KEYS}
    mode = config.get("pooling_mode", modes or (["mean"] if module.config else None))
    if mode is not None:
        config["pooling_mode"] = "+".join(mode) if isinstance(mode, Sequence) and not isinstance(mode, str) else mode
    return config
