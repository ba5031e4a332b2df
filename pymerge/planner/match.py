"""Holding the models of a merge against its donor, tensor by tensor: names, shapes, dtypes, tied weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pymerge.architecture.prefixes import AmbiguousPrefix, find_prefix, nearest_prefix, renamed
from pymerge.architecture.roles import Kind, Layer, classify, is_head_name, positions
from pymerge.architecture.tied import embedding_of, same_values, tied_tensors, ties
from pymerge.architecture.token_tables import is_token_table
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.dtypes import is_float, is_float8
from pymerge.config.merge_config import MergeConfig, participants
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs

_NAMES_SHOWN = 5
_MERGED_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Section:
    """Tensors of the output that are merged from the same models by the same config: all of them, or those of a slice.

    `config` has the section's own models, base and parameters. `participants` are the numbers, among config.models, of
    the models that take part, and `experts` these models, with their tensors under the output's names. `positions` has
    t in [0, 1] for each tensor of the section, for gradients. Layer i of the output is layer i + shift of an expert, if
    there are `shifts`.
    """

    config: MergeConfig
    participants: tuple[int, ...]
    experts: tuple[Checkpoint, ...]
    positions: Mapping[str, float]
    shifts: tuple[int, ...] = ()

    def input_names(self, name: str, layer: Layer) -> list[str]:
        """Names of this tensor of the output in the experts."""
        shifts = self.shifts or (0,) * len(self.experts)
        if layer.index is None:
            return [name] * len(shifts)
        rest = name[len(f"{layer.blocks}.{layer.index}") :]
        return [f"{layer.blocks}.{layer.index + shift}{rest}" for shift in shifts]


@dataclass(frozen=True)
class Matched:
    """Inputs whose experts have their tensors under the donor's names; `names` are those of the output, in the
    donor's file order, `sections` has the section that each belongs to."""

    inputs: Inputs
    names: list[str]
    warnings: list[str]
    sections: Mapping[str, Section]


def match_tensors(
    inputs: Inputs, layers: Mapping[str, Layer], config: MergeConfig, method: Method, problems: list[str]
) -> Matched:
    """Hold the experts against the donor, tensor by tensor; what does not fit is added to `problems`."""
    donor = inputs.donor
    warnings = [note for checkpoint in inputs.all for note in checkpoint.notes]
    tied = find_tied(donor, layers, warnings)
    names = [name for name in donor.tensors if name not in tied]
    merged = [name for name in names if layers[name].kind is not Kind.BUFFER]
    for name in merged:
        _check_dtype(donor, name, problems)
    matcher = Matcher(donor, layers, config, tied, merged, problems, warnings)
    experts = tuple(expert if expert.path == donor.path else matcher.match(expert) for expert in inputs.experts)
    section = Section(config, participants(config, method), experts, positions(layers, donor.config))
    return Matched(Inputs(donor, experts), names, list(dict.fromkeys(warnings)), dict.fromkeys(names, section))


def find_tied(donor: Checkpoint, layers: Mapping[str, Layer], warnings: list[str]) -> dict[str, str]:
    """Tensors of the donor that are not written, because transformers makes them from another one: name -> that."""
    tied = tied_tensors(donor, layers)
    for name in tied:
        if not same_values(donor, name, tied[name]):
            warnings.append(_differs(donor, name, tied[name]))
    if tied:
        warnings.append(f"{listed(tied)}: tied to the embedding, written once, with the embedding")
    return tied


@dataclass
class Matcher:
    """Fits one expert after the other to the donor."""

    donor: Checkpoint
    layers: Mapping[str, Layer]
    config: MergeConfig
    tied: Mapping[str, str]
    merged: list[str]  # what every expert must have
    problems: list[str]
    warnings: list[str]
    _base_rows: set[str] = field(default_factory=set)  # token tables that have been spoken of

    def match(self, expert: Checkpoint) -> Checkpoint:
        expert = self._with_heads(self._with_names(expert))
        for name in self.merged:
            if name in expert.tensors:
                _check_dtype(expert, name, self.problems)
                self._check_shape(expert, name)
        self._check_extra(expert)
        missing = [name for name in self.merged if name not in expert.tensors]
        if missing:
            self.problems.append(
                f"{expert.path} lacks {listed(missing)}{self._near(expert, missing)}; "
                f"list models that are fine-tuned from {self.donor.path}"
            )
        return expert

    def _needed(self, expert: Checkpoint) -> dict[str, tuple[int, ...]]:
        """Names and shapes that the expert must have; it may lack heads that it ties."""
        heads = Kind.HEAD if ties(expert.config) else None
        return {name: self.donor.tensors[name].shape for name in self.merged if self.layers[name].kind is not heads}

    def _with_names(self, expert: Checkpoint) -> Checkpoint:
        """The expert under the donor's names, where one prefix makes the difference."""
        theirs = {name: entry.shape for name, entry in expert.tensors.items()}
        try:
            prefix = find_prefix(self._needed(expert), theirs)
        except AmbiguousPrefix as error:
            self.problems.append(
                f"{expert.path}: its names match those of {self.donor.path} in more than one way: {error}; "
                "save the part that is to be merged as a model of its own"
            )
            return expert
        if prefix is None:
            return expert
        names = renamed(prefix, self._shapes, expert.tensors)
        count = sum(new != old for old, new in names.items())
        self.warnings.append(f"{expert.path}: {prefix.describe()} ({count} tensors), as in {self.donor.path}")
        return replace(expert, tensors={names[name]: entry for name, entry in expert.tensors.items()})

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.donor.tensors.items()}

    def _near(self, expert: Checkpoint, missing: list[str]) -> str:
        """A hint where a prefix would bring most, but not all, of the missing names."""
        theirs = {name: entry.shape for name, entry in expert.tensors.items()}
        nearest = nearest_prefix({name: self.donor.tensors[name].shape for name in missing}, theirs)
        return f" (with {nearest[0].describe()}, {nearest[1]} of these would be there)" if nearest else ""

    def _with_heads(self, expert: Checkpoint) -> Checkpoint:
        """The expert with what it ties: its embedding stands for a head that it does not store."""
        tensors = dict(expert.tensors)
        for name in self.merged:
            if name in tensors or self.layers[name].kind not in (Kind.HEAD, Kind.EMBEDDING):
                continue
            embedding = embedding_of(name, self.donor.tensors, self.layers)
            if embedding not in tensors:
                continue
            shared = self.donor.tensors[name].same_bytes(self.donor.tensors[embedding])
            if shared or (ties(expert.config) and self.layers[name].kind is Kind.HEAD):
                tensors[name] = tensors[embedding]
                self.warnings.append(f"{expert.path}: {name} is tied there: its {embedding} stands for it")
        return replace(expert, tensors=tensors)

    def _check_extra(self, expert: Checkpoint) -> None:
        donor = self.donor
        extra = [
            name
            for name, entry in expert.tensors.items()
            if is_float(entry.dtype) and (name not in donor.tensors or name in self.tied)
        ]
        if not extra:
            return
        theirs = classify({name: (entry.dtype, entry.shape) for name, entry in expert.tensors.items()}, expert.config)
        extra = [name for name in extra if not self._is_tied_copy(expert, name, theirs)]
        heads = [name for name in extra if is_head_name(name) or theirs[name].kind is Kind.HEAD]
        refused = {"error": extra, "heads": [name for name in extra if name not in heads], "ignore": []}
        wrong = refused[self.config.extra_tensors]
        if wrong:
            self.problems.append(
                f"{expert.path} has {listed(wrong)}, which {donor.path} has not; "
                "set extra_tensors: ignore to leave them out"
            )
        left = [name for name in extra if name not in wrong]
        if left:
            self.warnings.append(f"{expert.path}: left out {listed(left)}, which {donor.path} has not")

    def _is_tied_copy(self, expert: Checkpoint, name: str, layers: Mapping[str, Layer]) -> bool:
        """Whether an extra tensor is the expert's embedding a second time, or is taken for it."""
        embedding = embedding_of(name, expert.tensors, layers)
        if embedding is None or layers[name].kind not in (Kind.HEAD, Kind.EMBEDDING):
            return False
        if same_values(expert, name, embedding):
            return True
        if layers[name].kind is not Kind.HEAD or not (self.tied or ties(self.donor.config)):
            return False
        if ties(expert.config):
            self.warnings.append(_differs(expert, name, embedding))
        elif self.config.extra_tensors == "ignore":
            return False
        else:
            self.problems.append(
                f"{expert.path}: its {name} differs from its {embedding}, and {self.donor.path} ties the two; untie "
                "the base (write its head, tie_word_embeddings: false), or set extra_tensors: ignore to leave it out"
            )
        return True

    def _check_shape(self, expert: Checkpoint, name: str) -> None:
        theirs, ours = expert.tensors[name], self.donor.tensors[name]
        if theirs.shape == ours.shape:
            return
        where = f"{theirs.file}: tensor {theirs.name!r} has shape {list(theirs.shape)}, in {self.donor.path} it has"
        if not is_token_table(name, self.layers, self.donor.tensors, expert.tensors):
            self.problems.append(
                f"{where} {list(ours.shape)}; merge only models of the same architecture and vocabulary"
            )
        elif self.config.tokenizer is not None:
            return  # tokens are matched by name: see pymerge.planner.tokens
        elif self.config.vocabulary == "strict":
            self.problems.append(
                f"{where} {list(ours.shape)}: vocabularies of different sizes; set vocabulary: base to merge the rows "
                "that all models have and to take the others from the base, or tokenizer_source to match tokens by name"
            )
        else:
            common = min(theirs.shape[0], ours.shape[0])
            rest = "the base's are kept" if common < ours.shape[0] else "they are left out"
            self.warnings.append(f"{where} {list(ours.shape)}; from row {common} on, {rest}")


def _differs(checkpoint: Checkpoint, name: str, embedding: str) -> str:
    return (
        f"{checkpoint.path}: its {name} differs from {embedding}, to which its config.json ties it: the embedding is "
        f"used; write tie_word_embeddings: false there to merge {name} as well"
    )


def _check_dtype(checkpoint: Checkpoint, name: str, problems: list[str]) -> None:
    entry = checkpoint.tensors[name]
    if entry.dtype not in _MERGED_DTYPES and not is_float8(entry.dtype):
        problems.append(
            f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, and integers cannot be merged with numbers; if "
            "they are codes of a quantised model, merge the original weights instead; if not, save them as float32"
        )


def listed(names: Iterable[str]) -> str:
    """Number and first names of tensors, as in "2 tensors: a, b"."""
    names = list(names)
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    rest = len(names) - _NAMES_SHOWN
    return f"{count}: {', '.join(names[:_NAMES_SHOWN])}" + (f" and {rest} more" if rest > 0 else "")
