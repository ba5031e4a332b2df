"""Holding the models of a merge against its donor, tensor by tensor: names, shapes, dtypes, tied weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pymerge.adapters.forms import of_others, unmerged
from pymerge.architecture.buffers import constant
from pymerge.architecture.roles import Kind, Role, classify, positions
from pymerge.architecture.tied import embedding_of, same_values, says_tied, tied_tensors, ties
from pymerge.architecture.token_tables import is_token_table
from pymerge.architecture.words import is_head_name
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.compare import Relation, relation
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import is_float, is_float8
from pymerge.common.names import listed
from pymerge.config.merge_config import MergeConfig, participants
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs
from pymerge.planner.missing import refusal
from pymerge.planner.naming import under_names_of

_MERGED_DTYPES = {"F64", "F32", "F16", "BF16"}
_UNMERGED = "name the adapter that PEFT has saved, as BASE+ADAPTER, or save the model after merge_and_unload"


@dataclass(frozen=True)
class Section:
    """Tensors of the output that are merged from the same models by the same config: all of them, or those of a slice.

    `config` has the section's own models, base and parameters. `participants` are the numbers, among config.models, of
    the models that take part, and `experts` these models, with their tensors under the output's names. `positions` has
    t in [0, 1] for each tensor of the section, for gradients. Layer i of the output is layer i + shift of an expert, if
    there are `shifts`. `copied` are tensors that are the base's whatever the models have: those that no other has, and
    constants that one lacks.
    """

    config: MergeConfig
    participants: tuple[int, ...]
    experts: tuple[Checkpoint, ...]
    positions: Mapping[str, float]
    shifts: tuple[int, ...] = ()
    copied: frozenset[str] = frozenset()

    def input_names(self, name: str, role: Role) -> list[str]:
        """Names of this tensor of the output in the experts."""
        shifts = self.shifts or (0,) * len(self.experts)
        if role.index is None:
            return [name] * len(shifts)
        rest = name[len(f"{role.blocks}.{role.index}") :]
        return [f"{role.blocks}.{role.index + shift}{rest}" for shift in shifts]


@dataclass(frozen=True)
class Matched:
    """Inputs whose experts have their tensors under the donor's names; `names` are those of the output, in the
    donor's file order, `sections` has the section that each belongs to."""

    inputs: Inputs
    names: list[str]
    warnings: list[str]
    sections: Mapping[str, Section]


def match_tensors(
    inputs: Inputs, roles: Mapping[str, Role], config: MergeConfig, method: Method, problems: list[str]
) -> Matched:
    """Hold the experts against the donor, tensor by tensor; what does not fit is added to `problems`."""
    donor = inputs.donor
    warnings = [note for checkpoint in inputs.all for note in checkpoint.notes] + list(donor.base_notes)
    tied = find_tied(donor, roles, warnings)
    names = [name for name in donor.tensors if name not in tied]
    merged = [name for name in names if roles[name].kind is not Kind.BUFFER]
    for name in merged:
        _check_dtype(donor, name, problems)
    matcher = Matcher(donor, roles, config, tied, merged, problems, warnings)
    fitted = [matcher.match(expert, donor.tensors) for expert in inputs.experts if expert.path != donor.path]
    problems += [
        f"{each.checkpoint.path}: none of its tensors has the name of one of {donor.path}; list another model"
        for each in fitted
        if len(each.lacking) == len(merged) > 0
    ]
    others = {each.checkpoint.path: each.checkpoint for each in fitted}
    experts = tuple(others.get(expert.path, expert) for expert in inputs.experts)
    section = Section(
        config, participants(config, method), experts, positions(roles, donor.config), copied=copied(fitted)
    )
    said = says_tied(donor, tied, roles)
    return Matched(Inputs(said, experts), names, list(dict.fromkeys(warnings)), dict.fromkeys(names, section))


def find_tied(donor: Checkpoint, roles: Mapping[str, Role], warnings: list[str]) -> dict[str, str]:
    """Tensors of the donor that are not written, because transformers makes them from another one: name -> that."""
    tied = tied_tensors(donor, roles)
    for name in tied:
        if not same_values(donor, name, tied[name]):
            warnings.append(_differs(donor, name, tied[name]))
    if tied:
        warnings.append(f"{listed(tied)}: tied to the embedding, written once, with the embedding")
    return tied


@dataclass(frozen=True)
class Fitted:
    """An expert that has been fitted to the donor, and what it lacks: the base's tensors stand there. `constants` are
    those that it lacks, or has otherwise."""

    checkpoint: Checkpoint
    lacking: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()


def copied(fitted: Sequence[Fitted]) -> frozenset[str]:
    """Tensors taken from the base where it is merged with these models: those that all lack, and constants."""
    lacking = frozenset.intersection(*(each.lacking for each in fitted)) if fitted else frozenset()
    return lacking.union(*(each.constants for each in fitted))


@dataclass
class Matcher:
    """Fits one expert after the other to the donor."""

    donor: Checkpoint
    roles: Mapping[str, Role]
    config: MergeConfig
    tied: Mapping[str, str]
    merged: list[str]  # what every expert must have
    problems: list[str]
    warnings: list[str]

    def match(self, expert: Checkpoint, base: Mapping[str, TensorEntry] | None) -> Fitted:
        """The expert under the donor's names, with tensors of `base` where it lacks one and the config says so."""
        problems = len(self.problems)
        expert = self._with_names(expert)
        if len(self.problems) > problems:
            return Fitted(expert)  # whatever else is wrong with its names follows from that
        expert = self._with_heads(expert)
        constants = self._constants(expert) if base is not None else frozenset()
        expert = replace(expert, tensors=expert.tensors | {name: (base or {})[name] for name in constants})
        expert = self._with_numbers(expert)
        for name in self.merged:
            if name in expert.tensors:
                _check_dtype(expert, name, self.problems)
                self._check_shape(expert, name)
        self._check_extra(expert)
        missing = [name for name in self.merged if name not in expert.tensors]
        if not missing:
            return Fitted(expert, constants=constants)
        problem = refusal(expert, missing, self.donor, self.roles, self.config, stand_in=base is not None)
        if problem or base is None:
            self.problems.append(problem)
            return Fitted(expert, constants=constants)
        text = f"{expert.path} lacks {listed(missing)}: merged as if it had those of {self.donor.path}"
        self.warnings.append(f"{text} (missing_tensors: base)")
        tensors = expert.tensors | {name: base[name] for name in missing}
        return Fitted(replace(expert, tensors=tensors), frozenset(missing), constants)

    def _constants(self, expert: Checkpoint) -> frozenset[str]:
        """Constants of the donor that the expert lacks, or has in another shape, or as integers."""
        found = set()
        for name in self.merged:
            ours, theirs = self.donor.tensors[name], expert.tensors.get(name)
            differs = theirs is None or theirs.shape != ours.shape or not is_float(theirs.dtype)
            if differs and constant(name, ours.shape):
                found.add(name)
        return frozenset(found)

    def _with_names(self, expert: Checkpoint) -> Checkpoint:
        """The expert under the donor's names; it may lack heads that it ties."""
        heads = Kind.HEAD if ties(expert.config) else None
        named = under_names_of(self.donor, expert, [name for name in self.merged if self.roles[name].kind is not heads])
        self.warnings += named.notes
        self.problems += [named.problem] if named.problem else []
        return named.checkpoint

    def _with_heads(self, expert: Checkpoint) -> Checkpoint:
        """The expert with what it ties: its embedding stands for a head that it does not store."""
        tensors = dict(expert.tensors)
        for name in self.merged:
            if name in tensors or self.roles[name].kind not in (Kind.HEAD, Kind.EMBEDDING):
                continue
            embedding = embedding_of(name, self.donor.tensors, self.roles)
            if embedding not in tensors:
                continue
            said, head = ties(expert.config), self.roles[name].kind is Kind.HEAD
            if (said and head) or (not (said is False and head) and same_values(self.donor, name, embedding)):
                tensors[name] = tensors[embedding]
                self.warnings.append(f"{expert.path}: {name} is tied there: its {embedding} stands for it")
        return replace(expert, tensors=tensors)

    def _with_numbers(self, expert: Checkpoint) -> Checkpoint:
        """The expert with the donor's tensors in place of integers of the same values: masks are stored as either."""
        ours, theirs = self.donor.tensors, expert.tensors
        odd = [
            name for name in self.merged if name in theirs and is_float(ours[name].dtype) > is_float(theirs[name].dtype)
        ]
        if not odd or not self.donor.stamps or not expert.stamps:
            return expert
        with Reader(self.donor.stamps | expert.stamps) as reader:
            same = [name for name in odd if relation(reader, ours[name], theirs[name]) is Relation.SAME]
        return replace(expert, tensors=theirs | {name: ours[name] for name in same})

    def _check_extra(self, expert: Checkpoint) -> None:
        donor = self.donor
        extra = [
            name
            for name, entry in expert.tensors.items()
            if is_float(entry.dtype) and (name not in donor.tensors or name in self.tied)
        ]
        if factors := unmerged(extra):
            self.problems.append(
                f"{expert.path} has {listed(factors)}: factors of an adapter that is not merged into its weights; "
                + (of_others(factors) or _UNMERGED)
            )
            return
        constants = [name for name in extra if constant(name, expert.tensors[name].shape)]
        if constants:
            self.warnings.append(f"{expert.path}: left out {listed(constants)}, constants that {donor.path} has not")
        extra = [name for name in extra if name not in constants]
        if not extra:
            return
        theirs = classify({name: (entry.dtype, entry.shape) for name, entry in expert.tensors.items()}, expert.config)
        extra = [name for name in extra if not self._is_tied_copy(expert, name, theirs)]
        heads = [name for name in extra if is_head_name(name) or theirs[name].kind is Kind.HEAD]
        refused = {"error": extra, "heads": [name for name in extra if name not in heads], "ignore": []}
        wrong = refused[self.config.extra_tensors]
        if wrong:
            lacks = any(name not in expert.tensors for name in self.merged)  # perhaps the same ones, and left out twice
            rename = "rename them, if they are what it lacks, or " if lacks else ""
            self.problems.append(
                f"{expert.path} has {listed(wrong)}, which {donor.path} has not; "
                f"{rename}set extra_tensors: ignore to leave them out"
            )
        left = [name for name in extra if name not in wrong]
        if left:
            self.warnings.append(f"{expert.path}: left out {listed(left)}, which {donor.path} has not")

    def _is_tied_copy(self, expert: Checkpoint, name: str, roles: Mapping[str, Role]) -> bool:
        """Whether an extra tensor is the expert's embedding a second time, or is taken for it."""
        embedding = embedding_of(name, expert.tensors, roles)
        if embedding is None or roles[name].kind not in (Kind.HEAD, Kind.EMBEDDING):
            return False
        if same_values(expert, name, embedding):
            return True
        if roles[name].kind is not Kind.HEAD or not (self.tied or ties(self.donor.config)):
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
        if not is_token_table(name, self.roles, self.donor.tensors, expert.tensors):
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
