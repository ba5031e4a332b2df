"""The tensors of an expert under the base's names: other beginnings, other spellings, experts in another form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pymerge.architecture.expert_stacks import mixture_stems, refit, routers
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry


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
    from pymerge.architecture.renaming import AmbiguousNames

    naming = _Naming(donor, expert)
    try:
        naming.find_beginnings(wanted)
    except AmbiguousNames as error:
        text = (
            f"{expert.path}: its names match those of {donor.path} in more than one way: {error}; "
            "save the part that is to be merged as a model of its own"
        )
        return Named(expert, problem=text)
    naming.find_mixtures()
    naming.find_spellings()
    tensors = naming.result()
    notes = tuple(f"{expert.path}: {note}, as in {donor.path}" for note in naming.notes)
    return Named(replace(expert, tensors=tensors), notes) if notes else Named(expert)


def _is_there(name: str, donor: Checkpoint, expert: Checkpoint) -> bool:
    """Whether the expert has a tensor of the donor's name; a stack may lie otherwise."""
    ours, theirs = donor.tensors[name], expert.tensors.get(name)
    return theirs is not None and (len(ours.shape) != 3 or ours.shape == theirs.shape)


class _Naming:
    """Finds the names step by step: `_names` has the present one of each of the expert's."""

    def __init__(self, donor: Checkpoint, expert: Checkpoint) -> None:
        self._donor = donor.tensors
        self._family = str(donor.config.get("model_type", ""))
        self._expert = expert.tensors
        self._names = {name: name for name in expert.tensors}
        self._taken = set(expert.tensors)
        self._base = {name: entry.shape for name, entry in donor.tensors.items()}
        self.notes: list[str] = []

    def find_beginnings(self, wanted: Collection[str]) -> None:
        """Names that differ by their beginnings. Raises AmbiguousNames."""
        from pymerge.architecture.renaming import find_renamings, rename

        found = find_renamings(self._base, {name: entry.shape for name, entry in self._expert.items()}, wanted)
        if not found:
            return
        done: dict[str, int] = {}
        for name in self._expert:
            if name in self._base:
                continue
            new, renaming = rename(found, name, self._base)
            if renaming is not None and self._move(name, new) and new in self._base:
                done[renaming.describe()] = done.get(renaming.describe(), 0) + 1
        self.notes.append(", ".join(f"{text} ({_count(number)})" for text, number in done.items()))

    def find_mixtures(self) -> None:
        """Modules with experts under another name, and what is beside the experts in them."""
        stems = mixture_stems(self._donor, self._current())
        for old, new in stems.items():
            for name, now in list(self._names.items()):
                if now not in self._base and now.startswith(f"{old}."):
                    self._move(name, new + now[len(old) :])
        last = {(old.rpartition(".")[2], new.rpartition(".")[2]) for old, new in stems.items()}
        self.notes += [f"its {old!r} with experts is {new!r} ({len(stems)} modules)" for old, new in sorted(last)]
        found = routers(self._donor, self._current())
        self._respell(found)
        if found:
            self.notes.append(f"{_count(len(found))} beside experts matched by their shape: {next(iter(found))}, ...")

    def find_spellings(self) -> None:
        """Parameters that are spelt otherwise in modules of the same name."""
        from pymerge.architecture.spellings import respelt

        found = respelt(self._base, {name: entry.shape for name, entry in self._current().items()})
        self._respell(found)
        words = {(_last(old, new), _last(new, old)) for old, new in found.items()}
        if found:
            text = ", ".join(f"{old} read as {new}" for old, new in sorted(words))
            self.notes.append(f"{text} ({_count(len(found))})")

    def result(self) -> dict[str, TensorEntry]:
        """The expert's entries under the names that were found, and experts in the form that the donor has."""
        current = self._current()
        refitted = refit(self._donor, current, self._family)
        self.notes += refitted.notes
        names = {now: name for name, now in self._names.items()}
        tensors = {
            (now if now in self._base else names[now]): entry
            for now, entry in current.items()
            if now not in refitted.used
        }
        return tensors | refitted.entries

    def _current(self) -> dict[str, TensorEntry]:
        return {self._names[name]: entry for name, entry in self._expert.items()}

    def _respell(self, found: dict[str, str]) -> None:
        for name, now in list(self._names.items()):
            self._move(name, found.get(now, now))

    def _move(self, name: str, new: str) -> bool:
        """Give one of the expert's tensors another name; a name that is taken stays as it is."""
        old = self._names[name]
        if new == old or new in self._taken:
            return False
        self._taken.remove(old)
        self._taken.add(new)
        self._names[name] = new
        return True


def _last(name: str, other: str) -> str:
    """The words in which a name differs from another behind what both begin with."""
    words, others = name.split("."), other.split(".")
    same = next((i for i, (one, two) in enumerate(zip(words, others, strict=False)) if one != two), len(words))
    return ".".join(words[same:])


def _count(number: int) -> str:
    return f"{number} tensor{'' if number == 1 else 's'}"
