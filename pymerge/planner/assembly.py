"""Sections of an output that is put together, and their models held against the donor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pymerge.architecture.roles import Kind, Role
from pymerge.architecture.tied import says_tied
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.common.names import listed
from pymerge.config.merge_config import MergeConfig, participants
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs
from pymerge.planner.match import Matched, Matcher, Section, copied, find_tied


@dataclass(frozen=True)
class Draft:
    """Section of a slice, or of a module that is not sliced, before its models are held against the donor.

    It knows all models of its config, also the base, from which names and dtypes of its tensors may come.
    """

    config: MergeConfig
    models: tuple[Checkpoint, ...]  # in the order of config.models, with their layers under the output's numbers
    shifts: tuple[int, ...]  # from the output's numbers of layers to each model's
    origin: int  # the model that gives names and dtypes: the base, or the first
    positions: Mapping[str, float]  # of its tensors


@dataclass(frozen=True)
class Assembly:
    """Drafts of all sections. `inputs.donor` has its names, with shapes and dtypes of the donor's own layers."""

    config: MergeConfig
    method: Method
    inputs: Inputs
    drafts: tuple[Draft, ...]
    warnings: tuple[str, ...]

    def match(self, roles: Mapping[str, Role], problems: list[str]) -> Matched:
        """Hold the models of each section against the donor; what does not fit is added to `problems`."""
        donor = self.inputs.donor
        warnings = [note for checkpoint in self.inputs.all for note in checkpoint.notes]
        warnings += [*donor.base_notes, *self.warnings]
        tied = find_tied(donor, roles, warnings)
        tensors: dict[str, TensorEntry] = {}
        sections: dict[str, Section] = {}
        for draft in self.drafts:
            own = [name for name in draft.positions if name not in tied]
            merged = [name for name in own if roles[name].kind is not Kind.BUFFER]
            matcher = Matcher(donor, roles, draft.config, tied, merged, problems, warnings)
            origin = matcher.match(draft.models[draft.origin], None)
            base = origin.checkpoint.tensors
            matched = [
                origin if number == draft.origin else matcher.match(model, base)
                for number, model in enumerate(draft.models)
            ]
            tensors |= {name: base.get(name, donor.tensors[name]) for name in own}
            chosen = participants(draft.config, self.method)
            experts = tuple(matched[index].checkpoint for index in chosen)
            shifts = tuple(draft.shifts[index] for index in chosen)
            kept = copied([matched[index] for index in chosen if index != draft.origin])
            section = Section(draft.config, chosen, experts, draft.positions, shifts, kept)
            sections |= dict.fromkeys(own, section)
        names = [name for name in donor.tensors if name not in tied]
        output = says_tied(replace(donor, tensors={name: tensors[name] for name in names}), tied, roles)
        if not problems:
            problems += _other_shapes(donor, output)
            warnings += _other_dtypes(donor, output) if not (self.config.out_dtype or self.config.dtype) else []
        problems[:] = dict.fromkeys(problems)
        return Matched(replace(self.inputs, donor=output), names, list(dict.fromkeys(warnings)), sections)


def _other_shapes(donor: Checkpoint, output: Checkpoint) -> list[str]:
    """Tensors whose rows are those of another model than the one that config.json is of."""
    return [
        f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, and config.json is that of {donor.path}, "
        f"where it has {list(donor.tensors[name].shape)}; take models of one vocabulary for first and last slice"
        for name, entry in output.tensors.items()
        if entry.shape != donor.tensors[name].shape
    ]


def _other_dtypes(donor: Checkpoint, output: Checkpoint) -> list[str]:
    """A warning if tensors have other dtypes than the model that config.json is of."""
    others = [
        name
        for name, entry in output.tensors.items()
        if is_float(entry.dtype) and entry.output_dtype != donor.tensors[name].output_dtype
    ]
    text = f"{listed(others)}: of another dtype than in {donor.path}, and written so; set dtype to have one for all"
    return [text] if others else []
