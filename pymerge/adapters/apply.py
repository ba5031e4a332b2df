"""An adapter on its base, as a checkpoint: the base's entries, but for what the adapter's files change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property

from pymerge.adapters.decoders import AddedBias, TokenRows
from pymerge.adapters.experts import NUMBERED, ExpertParameter, assign, in_memory, in_stack, stacks_of, switched, terms
from pymerge.adapters.fitting import Fitting
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Module
from pymerge.adapters.low_rank import LowRank, Magnitude, Term
from pymerge.adapters.names import Placed
from pymerge.adapters.placing import may_be, place_modules
from pymerge.adapters.read import read_adapter
from pymerge.adapters.settings import Settings, several_fit
from pymerge.adapters.ties import drop_tied_heads, ties_head
from pymerge.architecture.roles import Role
from pymerge.architecture.tied import tied_tensors
from pymerge.checkpoint.beside import Beside
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.compare import Relation, relation
from pymerge.checkpoint.decoded import Decoder, decoded
from pymerge.checkpoint.model_files import ADAPTER_CONFIG
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError


def adapted(
    base: Checkpoint,
    files: AdapterFiles,
    settings: Settings | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Checkpoint:
    """The model that an adapter makes of its base. Its tensors have the base's names; those that it does not change are
    the base's own entries. `settings` are what its config says, where something else knows better, `roles` those of the
    base's tensors, where they are known.

    Raises CheckpointError for all that is wrong with the adapter, or does not fit the base.
    """
    builder = _Builder(base, files, settings, roles)
    builder.build()
    return replace(
        base,
        path=files.path,
        files=(files.file,),
        tensors=builder.tensors,
        other_files=files.other_files,
        stamps=files.stamps | base.all_stamps,
        notes=(*files.notes, *builder.settings.notes, *builder.notes()),
        origin=files.origin,
        base_notes=(),
        copied={},
        beside=Beside(),
        base=base,
    )


class _Builder:
    def __init__(
        self, base: Checkpoint, files: AdapterFiles, settings: Settings | None, roles: Mapping[str, Role] | None
    ) -> None:
        self._base = base
        self._files = files
        said, self._keys = read_adapter(base, files)
        self.settings = said if settings is None else settings
        self._fitting = Fitting(base, files, self.settings, roles)
        self.tensors: dict[str, TensorEntry] = dict(base.tensors)
        self._terms: dict[str, list[tuple[Module, Term]]] = {}
        self._of_experts: set[str] = set()
        self._magnitudes: dict[str, Magnitude] = {}
        self._other_ranks: list[str] = []
        self._several: dict[tuple[str, ...], str] = {}
        self._twice: list[str] = []

    def build(self) -> None:
        keys = self._keys
        if not (keys.modules or keys.values or keys.tokens):
            raise CheckpointError(f"{self._files.file}: has no tensors; save the adapter again")
        tied = ties_head(self._base, self._fitting.roles)
        if tied:
            drop_tied_heads(self._base, self._fitting.roles, keys, self._files, self.settings.keeps_tie)
        placed = place_modules(self._base, self._files, keys)
        adapted = {module.name for module in keys.modules.values()}
        for name, entry in keys.values.items():
            where = placed.name(name)
            if name.rpartition(".")[0] not in adapted or not self._is_copy(entry, where):
                self.tensors[where] = entry
        self._add_factors(placed)
        for name, found in self._terms.items():
            stacked = name in self._of_experts and len(self.tensors[name].shape) == 3
            own = tuple(term for _, term in found)
            self._put(name, LowRank(self.tensors[name], own, stacked, self._magnitudes.get(name)))
        for module, entry in keys.tokens.items():
            self._add_tokens(placed, module, entry)
        if tied:
            self._leave_out_tied_heads()

    def _is_copy(self, entry: TensorEntry, name: str) -> bool:
        """Whether a tensor beside factors is the base's own, as PEFT saves tables that it has adapted."""
        base = self.tensors.get(name)
        if base is None or base.shape != entry.shape:
            return False
        with Reader(self._files.stamps | self._base.stamps) as reader:
            return relation(reader, entry, base) is Relation.SAME

    def _leave_out_tied_heads(self) -> None:
        """Leave out heads that the base has stored a second time: the embedding, which has changed, stands for them."""
        own, theirs = self.tensors, self._base.tensors
        for head, embedding in tied_tensors(self._base, self._fitting.roles).items():
            if own[head] is theirs[head] and own[embedding] is not theirs[embedding]:
                del own[head]

    def notes(self) -> Iterable[str]:
        """Notes for people."""
        path, said = self._files.path, self.settings.base
        if said and not may_be(said, self._base):
            yield f"{path}: was trained on {shorten(said)}, and is applied to {self._base.path}"
        for name in self.settings.saved:
            there = any(f".{name}." in f".{tensor}" for tensor in self._base.tensors)
            if there and not any(f"{name}." in key for key in self._files.tensors):
                yield f"{path}: has no tensor of {shorten(name)}, which modules_to_save names: they are the base's"
        for several, module in self._several.items():
            yield several_fit(self.settings.file, several, module)
        if self._other_ranks:
            yield (
                f"{path}: {len(self._other_ranks)} modules ({first_few(self._other_ranks)}) have another rank than "
                f"{ADAPTER_CONFIG} says, by which they are scaled; PEFT itself cannot load it"
            )
        if self._twice:
            yield f"{path}: {first_few(self._twice)} is added twice, as PEFT adds it in nn.MultiheadAttention"

    @cached_property
    def _stacks(self) -> dict[str, list[ExpertParameter]]:
        return stacks_of(self.tensors)

    def _add_factors(self, placed: Placed) -> None:
        alike: dict[str, list[Module]] = {}
        for module in self._keys.modules.values():
            alike.setdefault(module.name, []).append(module)
        for name, modules in alike.items():
            where = placed.modules[name]
            if modules[0].turned and len(modules[0].a.shape) == 3:
                self._add_switched(modules[0], where)
                continue
            single = len(modules) == 1 and modules[0].depth == 0
            weights = (f"{where}.weight", f"{where}.in_proj_weight")
            tensor = next((weight for weight in weights if weight in self.tensors), None)
            convolution = tensor is not None and len(modules[0].a.shape) > 2
            parameters = [] if convolution else self._stacks.get(where, [])
            if tensor is None and not parameters:
                parameters = list(in_memory(where, self.tensors))
            if parameters:
                self._add_stacks(modules, where, parameters)
            elif tensor is not None and single:
                self._add_matrix(modules[0], tensor)
            elif single and (found := NUMBERED.fullmatch(where)):
                self._add_single(modules[0], found["experts"])
            else:
                raise self._fitting.no_fit(modules[0], where)

    def _add_matrix(self, module: Module, tensor: str) -> None:
        """Factors of a module with one weight."""
        entry, where = self.tensors[tensor], tensor.rpartition(".")[0]
        left, right, of_rows = self._fitting.sides(module, tensor, entry)
        attention = f"{where.rpartition('.')[0]}.in_proj_weight" in self.tensors
        outer = attention and (module.outer, 0) in self._keys.modules  # nn.MultiheadAttention
        parameter = f"{module.name}.{tensor.rpartition('.')[2]}"
        own = parameter if self.settings.targets(parameter) else module.name
        scale = self._scale(module, module.outer if outer else own, right.shape[0])
        if outer:
            self._twice.append(module.name)
            scale *= 2
        self._add_term(tensor, module, Term(left, right, scale))
        if "bias" in module.fields:
            self._add_bias(module, tensor, scale)
        self._add_magnitude(module, tensor, of_rows)

    def _scale(self, module: Module, name: str, rank: int) -> float:
        if module.scale is not None:
            return module.scale
        said = self.settings.scale(name)
        if said.several:
            self._several.setdefault(said.several, name)
        if said.rank != rank:
            self._other_ranks.append(module.name)
        return said.value

    def _add_stacks(self, modules: list[Module], where: str, parameters: list[ExpertParameter]) -> None:
        fits = assign(modules, parameters, self.settings.parameters, self._fitting.stack_is_transposed)
        if fits is None:
            raise self._fitting.no_fit(modules[0], where)
        for fit in fits:
            if len(fit.module.fields) > 2:
                raise self._fitting.misfit(
                    fit.module, "have a bias or lengths beside them, which no stack of experts has"
                )
            rank = fit.module.a.shape[0] // fit.parameter.shape[0]
            scale = self._scale(fit.module, f"{fit.module.name}.{fit.parameter.name}", rank)
            self._add_experts(fit.module, terms(fit, scale))

    def _add_switched(self, module: Module, where: str) -> None:
        """Factors of all experts' matrices of one kind, as mlx-lm has them."""
        found = switched(module, where, self.tensors, self._scale(module, module.name, module.a.shape[1]))
        if found is None or len(module.fields) > 2:
            raise self._fitting.no_fit(module, where)
        self._add_experts(module, found)

    def _add_single(self, module: Module, experts: str) -> None:
        """Factors of one expert, of which the base has a stack."""
        found = in_stack(module, experts, self.tensors, self._scale(module, module.name, module.a.shape[0]))
        if found is None or len(module.fields) > 2:
            raise self._fitting.no_fit(module, experts)
        self._add_experts(module, [found])

    def _add_experts(self, module: Module, found: Iterable[tuple[str, Term]]) -> None:
        for name, term in found:
            self._of_experts.add(name)
            self._add_term(name, module, term)

    def _add_term(self, tensor: str, module: Module, term: Term) -> None:
        others = self._terms.setdefault(tensor, [])
        taken = [other for other, each in others if (each.number, each.first) == (term.number, term.first)]
        if taken:
            raise CheckpointError(
                f"{self._files.file}: {module.name} and {taken[0].name} both adapt {tensor} of {self._base.path}; "
                f"{self._files.merged_elsewhere}"
            )
        others.append((module, term))

    def _add_bias(self, module: Module, tensor: str, scale: float) -> None:
        name, entry = f"{tensor.rpartition('.')[0]}.bias", module.fields["bias"]
        if name not in self.tensors:
            raise CheckpointError(
                f"{entry.file}: tensor {shorten(entry.name)} is added to a bias, and {self._base.path} has no {name}; "
                f"{self._files.merged_elsewhere}"
            )
        if entry.shape != self.tensors[name].shape:
            raise self._fitting.misfit(
                module, f"have a bias {list(entry.shape)}, and {name} is {list(self.tensors[name].shape)}"
            )
        self._put(name, AddedBias(self.tensors[name], entry, scale))

    def _add_magnitude(self, module: Module, tensor: str, of_rows: bool) -> None:
        entry = module.fields.get("lora_magnitude_vector")
        if (entry is not None) != self.settings.dora:
            has, said = "has no" if entry is None else "has a", str(self.settings.dora).lower()
            raise CheckpointError(
                f"{self._files.file}: {has} lora_magnitude_vector of {module.name}, and {self.settings.file.name} says "
                f"use_dora: {said}; correct it, or save the adapter again"
            )
        if entry is None:
            return
        shape = self.tensors[tensor].shape
        length = shape[0] if of_rows else math.prod(shape[1:])
        if entry.numel != length:
            raise self._fitting.misfit(module, f"have {entry.numel} lengths for {tensor} {list(shape)}")
        self._magnitudes[tensor] = Magnitude(entry, of_rows)

    def _add_tokens(self, placed: Placed, module: str, entry: TensorEntry) -> None:
        name = f"{placed.modules[module]}.weight"
        table = self.tensors.get(name)
        indices = self.settings.token_indices(module)
        where = f"{entry.file}: tensor {shorten(entry.name)}"
        if indices is None or len(indices) != entry.shape[0]:
            raise CheckpointError(
                f"{where} has {entry.shape[0]} rows, and trainable_token_indices of {ADAPTER_CONFIG} does not give as "
                f"many for {module}; save the adapter again"
            )
        if table is None or len(table.shape) != 2 or table.shape[1:] != entry.shape[1:]:
            has = "no table" if table is None else f"{list(table.shape)}"
            raise CheckpointError(
                f"{where} has rows of {list(entry.shape[1:])}, and {name} of {self._base.path} is {has}; name the "
                "model that the adapter is for"
            )
        beyond = [index for index in indices if not 0 <= index < table.shape[0]]
        if beyond:
            raise CheckpointError(
                f"{where} replaces row {beyond[0]} of {name}, which has {table.shape[0]} rows in {self._base.path}; "
                "resize the base's vocabulary as it was in training, and name the result as base"
            )
        self._put(name, TokenRows(table, entry, indices))

    def _put(self, name: str, decoder: Decoder) -> None:
        own = self._base.tensors.get(name, self.tensors[name])
        self.tensors[name] = decoded(name, decoder, own.output_dtype)
