"""The tensors of an expert under the base's names: other beginnings, other spellings, experts in another form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pymerge.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Named:
    """A model under the base's names, as far as they are known; what was done, in words; what it is open about."""

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    problem: str = ""


def under_names_of(donor: Checkpoint, expert: Checkpoint, wanted: Collection[str]) -> Named:
    """The expert with its tensors under the donor's names; those that the donor has not keep theirs.

    Args:
        wanted: names of the donor that the expert should have.
    """
    if all(_is_there(name, donor, expert) for name in wanted):
        return Named(expert)
    # Few merges need them, and each takes its time to import.
    from pymerge.architecture.renaming import AmbiguousNames
    from pymerge.planner.name_steps import Naming

    naming = Naming(donor, expert)
    try:
        naming.find_beginnings(wanted)
        naming.find_mixtures()
    except AmbiguousNames as error:
        text = (
            f"{expert.path}: its names match those of {donor.path} in more than one way: {error}; "
            "save the part that is to be merged as a model of its own, under the names of that model"
        )
        return Named(expert, problem=text)
    tensors = naming.result()
    notes = tuple(f"{expert.path}: {note}, as in {donor.path}" for note in naming.notes)
    return Named(replace(expert, tensors=tensors), notes)


def _is_there(name: str, donor: Checkpoint, expert: Checkpoint) -> bool:
    """Whether the expert has a tensor of the donor's name; a stack may lie otherwise."""
    ours, theirs = donor.tensors[name], expert.tensors.get(name)
    return theirs is not None and (len(ours.shape) != 3 or ours.shape == theirs.shape)
