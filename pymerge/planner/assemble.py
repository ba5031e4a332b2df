"""Outputs that are put together: layers of the sources of each slice, towers of the models of each module.

A slice is a merge of its own, of some layers of each source. So it gets a config of its own, with its models, base and
parameters, and its sources are seen with the output's numbers of layers; then it is matched and planned like any merge.
What decides names, shapes and config.json is the donor, with as many layers as the output will have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pymerge.architecture.layer_counts import NoLayerCountError, resized
from pymerge.architecture.roles import Kind, positions
from pymerge.architecture.stacks import is_first, shared_tensors, stacks, towers
from pymerge.architecture.tied import embedding_of
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.names import listed
from pymerge.config.document import Location
from pymerge.config.entries import ModelEntry, SliceEntry, SourceEntry
from pymerge.config.merge_config import MergeConfig
from pymerge.config.references import same_model
from pymerge.config.settings import Setting
from pymerge.errors import PlanError
from pymerge.methods.base import Method
from pymerge.planner.assembly import Assembly, Draft
from pymerge.planner.inputs import Inputs, donor_of, open_models
from pymerge.planner.naming import under_names_of
from pymerge.planner.sources import Source, classified, read_source


def arrange(config: MergeConfig, method: Method, planned: Mapping[str, Checkpoint] | None = None) -> Assembly:
    """Open the models of a config with slices or modules, and find the tensors of each section.

    Args:
        planned: models that will be written before the merge runs.

    Raises:
        PlanError: a model that cannot be opened; layers that a model has not; towers that cannot be told apart.
    """
    opened = open_models(config, [config.donor, *(entry.model for entry in config.models)], planned)
    builder = _Builder(config, method, opened)
    builder.find_names()
    if config.slices:
        builder.add_slices()
    else:
        builder.add_modules()
    return builder.finish()


class _Builder:
    """Collects drafts of sections, the donor's tensors under the output's names, its config.json, and problems."""

    def __init__(self, config: MergeConfig, method: Method, opened: Mapping[str, Checkpoint]) -> None:
        self._config = config
        self._method = method
        self._opened = opened
        self._donor = donor_of(config, opened)
        self._layers = classified(self._donor)
        self._stacks = stacks(self._layers)
        self._tensors: dict[str, TensorEntry] = {}
        self._json = self._donor.config
        self._drafts: list[Draft] = []
        self._problems: list[str] = []
        self._warnings: list[str] = []

    def finish(self) -> Assembly:
        if self._problems:
            raise PlanError(dict.fromkeys(self._problems))
        donor = replace(self._donor, tensors=self._tensors, config=self._json)
        others = tuple(checkpoint for checkpoint in self._opened.values() if checkpoint is not self._donor)
        inputs = Inputs(donor, others)
        return Assembly(self._config, self._method, inputs, tuple(self._drafts), tuple(self._warnings))

    def find_names(self) -> None:
        """All models under the donor's names."""
        wanted = [name for name, role in self._layers.items() if role.kind is not Kind.BUFFER]
        named = {
            model: under_names_of(self._donor, checkpoint, wanted)
            for model, checkpoint in self._opened.items()
            if checkpoint.path != self._donor.path
        }
        self._opened = {**self._opened, **{model: each.checkpoint for model, each in named.items()}}
        self._warnings += [note for each in named.values() for note in each.notes]
        self._problems += [each.problem for each in named.values() if each.problem]

    def add_slices(self) -> None:
        """The slices of a model that has one list of layers."""
        if len(self._stacks) == 1:
            (blocks,) = self._stacks
            self._add_sliced(("slices",), self._config.slices, [self._config.parameters], list(self._layers), blocks)
            return
        lists = f"{len(self._stacks)} lists of layers ({', '.join(self._stacks) or 'no numbered modules'})"
        self._add_problem(("slices",), f": {self._donor.path} has {lists}; write modules, with slices in each")

    def add_modules(self) -> None:
        """The modules, each with its part of the donor's tensors."""
        heads = {
            name: embedding
            for name, role in self._layers.items()
            if role.kind is Kind.HEAD and (embedding := embedding_of(name, self._donor.tensors, self._layers))
        }
        owned = towers(list(self._config.modules), self._layers, heads)
        if left := owned.pop(""):
            text = f": no module has {listed(left)} of {self._donor.path}; add the module that they are of"
            self._add_problem(("modules",), text)
        for name, module in self._config.modules.items():
            blocks = list(dict.fromkeys(self._layers[tensor].blocks for tensor in owned[name]))
            lists = [path for path in blocks if path]
            parameters = [module.parameters, self._config.parameters]
            if not owned[name]:
                tops = ", ".join(dict.fromkeys(".".join(tensor.split(".")[:2]) for tensor in self._layers))
                text = f" is in the name of no tensor of {self._donor.path}; its tensors begin with {tops}"
                self._add_problem(("modules", name), text)
            elif module.models:
                self._add_whole(("modules", name, "models"), module.models, parameters, owned[name])
            elif len(lists) == 1:
                self._add_sliced(("modules", name, "slices"), module.slices, parameters, owned[name], lists[0])
            else:
                text = f": it has {len(lists)} lists of layers in {self._donor.path}; give models instead of slices"
                self._add_problem(("modules", name, "slices"), text)

    def _add_problem(self, location: Location, text: str) -> None:
        self._problems.append(self._config.at(*location) + text)

    def _add_whole(
        self,
        location: Location,
        entries: Sequence[ModelEntry],
        parameters: Sequence[Mapping[str, Setting]],
        names: list[str],
    ) -> None:
        """A module of whole models; the base takes part in task vectors whether it is listed or not."""
        base = self._config.base_model
        listed_base = next((i for i, entry in enumerate(entries) if same_model(entry.model, base)), None)
        if self._method.needs_base and base and listed_base is None:
            entries = [*entries, ModelEntry(model=base)]
        checkpoints = []
        for entry in entries:
            opened = self._opened[entry.model]
            kept = {name: each for name, each in opened.tensors.items() if name not in self._layers or name in names}
            checkpoints.append(replace(opened, tensors=kept))
        self._tensors |= {name: self._donor.tensors[name] for name in names}
        places = positions(self._layers, self._donor.config)
        own_places = {name: places[name] for name in names}
        self._add_draft(entries, base, parameters, tuple(checkpoints), (0,) * len(entries), own_places)

    def _add_sliced(
        self,
        location: Location,
        entries: Sequence[SliceEntry],
        parameters: Sequence[Mapping[str, Setting]],
        names: list[str],
        blocks: str,
    ) -> None:
        """Slices of a tower: what stands before its layers goes with the first slice, what stands behind with the
        last."""
        shared = shared_tensors(self._layers)
        loose = [name for name in names if self._layers[name].index is None or name in shared]
        before = [name for name in loose if is_first(name, self._layers[name])]
        behind = [name for name in loose if name not in before]
        self._tensors |= {name: self._donor.tensors[name] for name in before}
        order: list[tuple[Mapping[str, Any], int]] = []
        for number, entry in enumerate(entries):
            outer = [*before * (number == 0), *behind * (number == len(entries) - 1)]
            self._add_slice(entry, (*location, number, "sources"), parameters, blocks, outer, order)
        self._tensors |= {name: self._donor.tensors[name] for name in behind}
        self._resize(blocks, order)

    def _add_slice(
        self,
        entry: SliceEntry,
        location: Location,
        parameters: Sequence[Mapping[str, Setting]],
        blocks: str,
        outer: list[str],
        order: list[tuple[Mapping[str, Any], int]],
    ) -> None:
        sources = [self._source(each, blocks, (*location, i)) for i, each in enumerate(entry.sources)]
        found = [source for source in sources if source is not None]
        if len(found) < len(sources):
            return
        base = entry.base_model or self._config.base_model
        origin = self._origin(entry.sources, base)
        first, (start, stop) = len(order), entry.sources[origin].layer_range
        places: dict[str, float] = {}
        for number in range(start, stop):
            for rest in found[origin].roles[number]:
                name = f"{blocks}.{len(order)}{rest}"
                places[name] = (number - start) / (stop - start - 1) if stop - start > 1 else 1.0
                self._place(name, blocks, rest, number, (*location, origin))
            order.append((found[origin].checkpoint.config, number))
        places |= dict.fromkeys(outer, 0.0)
        models = tuple(
            source.placed(blocks, each.layer_range, first, loose=bool(outer))
            for source, each in zip(found, entry.sources, strict=True)
        )
        shifts = tuple(each.layer_range[0] - first for each in entry.sources)
        self._add_draft(entry.sources, base, [entry.parameters, *parameters], models, shifts, places)

    def _add_draft(
        self,
        entries: Sequence[ModelEntry],
        base: str | None,
        parameters: Sequence[Mapping[str, Setting]],
        models: tuple[Checkpoint, ...],
        shifts: tuple[int, ...],
        places: Mapping[str, float],
    ) -> None:
        config = self._config.model_copy(
            update={
                "models": tuple(ModelEntry(model=entry.model, parameters=entry.parameters) for entry in entries),
                "base_model": base,
                "parameters": _layered(parameters),
                "slices": (),
                "modules": {},
            }
        )
        self._drafts.append(Draft(config, models, shifts, self._origin(entries, base), places))

    def _origin(self, entries: Sequence[ModelEntry], base: str | None) -> int:
        """Number of the base among the models, or of the first."""
        bases = (i for i, entry in enumerate(entries) if same_model(entry.model, base))
        return next(bases, 0) if self._method.needs_base else 0

    def _place(self, name: str, blocks: str, rest: str, number: int, location: Location) -> None:
        """Find the donor's tensor that a tensor of the output must be like: that of the same layer, or of any."""
        numbers = [number, *range(self._stacks[blocks])]
        entry = next((found for i in numbers if (found := self._donor.tensors.get(f"{blocks}.{i}{rest}"))), None)
        if entry is not None:
            self._tensors[name] = entry
        else:
            text = f": its layers have a tensor {rest[1:]!r}, and those of {self._donor.path} have none"
            self._add_problem(location, f"{text}; list models of one architecture")

    def _source(self, entry: SourceEntry, blocks: str, location: Location) -> Source | None:
        """The model with its layers; None and a problem if it has not those that are asked of it."""
        checkpoint = self._opened[entry.model]
        source = read_source(checkpoint, self._donor, blocks, self._stacks)
        if source is None:
            text = f": {checkpoint.path} has no layers under {blocks!r}, as {self._donor.path} has"
            self._add_problem(location, f"{text}; list models of one architecture")
            return None
        start, stop = entry.layer_range
        if all(number in source.roles for number in range(start, stop)):
            return source
        count = 1 + max(source.roles)
        text = f" is [{start}, {stop}], but {checkpoint.path} has {count} layers ({blocks}.0 to .{count - 1})"
        self._add_problem((*location, "layer_range"), f"{text}; correct the range, whose end is exclusive")
        return None

    def _resize(self, blocks: str, order: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """The number of layers, and lists with an entry for each layer, in config.json."""
        old = self._stacks[blocks]
        if not self._json or [number for _, number in order] == list(range(old)):
            return
        where = f"{self._donor.path}/config.json"
        try:
            self._json, left = resized(self._json, blocks, old, order)
        except NoLayerCountError:
            text = f"no key gives {old} as the number of layers ({blocks}), so it cannot be set to {len(order)}"
            self._problems.append(f"{where}: {text}; correct that file, or take another base_model")
            return
        if left:
            text = f"{', '.join(left)} names layers by number and is copied as it is; correct it in the output"
            self._warnings.append(f"{where}: {text}")


def _layered(levels: Sequence[Mapping[str, Setting]]) -> dict[str, Setting]:
    """Settings of several levels as one: where no entry of the first fits a tensor, the next level is asked."""
    names = dict.fromkeys(name for level in levels for name in level)
    return {
        name: Setting(tuple(entry for level in levels if name in level for entry in level[name].entries))
        for name in names
    }
