"""The steps by which an expert's tensors get the base's names: beginnings, modules of experts, spellings, forms."""

from __future__ import annotations

from collections.abc import Collection

from pymerge.architecture.expert_stacks import mixture_stems, refit, routers
from pymerge.architecture.renaming import AmbiguousNames, find_renamings
from pymerge.architecture.spellings import WRAPPERS, spelling, unwrapped, usual
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry


class Naming:
    """Finds the names step by step. `_names` has the present one of each of the expert's; both models are seen under
    usual spellings meanwhile."""

    def __init__(self, donor: Checkpoint, expert: Checkpoint) -> None:
        self._expert = expert.tensors
        self._family = str(donor.config.get("model_type", ""))
        self._usual = usual({name: entry.shape for name, entry in expert.tensors.items()})
        self._names = dict(self._usual)
        self._taken = set(self._names.values())
        spelt = usual({name: entry.shape for name, entry in donor.tensors.items()})
        self._donor = {spelt[name]: entry for name, entry in donor.tensors.items()}
        self._donor_names = {new: name for name, new in spelt.items()}
        self._base = {name: entry.shape for name, entry in self._donor.items()}
        self.notes: list[str] = []

    def find_beginnings(self, wanted: Collection[str]) -> None:
        """Names that differ by their beginnings. Raises AmbiguousNames."""
        needed = set(wanted)
        lacking = [name for name, own in self._donor_names.items() if own in needed]
        theirs = {name: entry.shape for name, entry in self._current().items()}
        found = find_renamings(self._base, theirs, lacking)
        done: dict[str, int] = {}
        for name, now in list(self._names.items()) if found.each else ():
            if now in self._base:
                continue
            new, renaming = found.of(now)
            if renaming is not None and self._move(name, new) and new in self._base:
                done[renaming.describe()] = done.get(renaming.describe(), 0) + 1
        if done:
            self.notes.append(", ".join(f"{text} ({_count(number)})" for text, number in done.items()))

    def find_mixtures(self) -> None:
        """Modules with experts under another name, and their routers. Raises AmbiguousNames."""
        stems = mixture_stems(self._donor, self._current())
        for old, new in stems.items():
            for name, now in list(self._names.items()):
                if now in self._base or not now.startswith(f"{old}."):
                    continue
                there = new + now[len(old) :]
                if not self._move(name, there) and there in self._base:
                    raise AmbiguousNames(f"{there}: its {name}, or another")
        last = {(old.rpartition(".")[2], new.rpartition(".")[2]) for old, new in stems.items()}
        self.notes += [f"its {old!r} with experts is {new!r} ({len(stems)} modules)" for old, new in sorted(last)]
        found = routers(self._donor, self._current())
        for name, now in list(self._names.items()):
            self._move(name, found.get(now, now))
        if found:
            self.notes.append(f"{_count(len(found))} of routers matched by their shape: {min(found)} and others")

    def result(self) -> dict[str, TensorEntry]:
        """The expert's entries under the names that were found, and experts in the form that the donor has."""
        current = self._current()
        refitted = refit(self._donor, current, self._family)
        found: dict[str, TensorEntry] = {}
        spelt: dict[tuple[str, str], int] = {}
        wrapped: dict[tuple[str, str], int] = {}
        for name, now in self._names.items():
            if now in refitted.used:
                continue
            ours = self._donor_names.get(now, name)
            found[ours] = self._expert[name]
            if now in self._base:
                wrapped[_wrappers(name), _wrappers(ours)] = wrapped.get((_wrappers(name), _wrappers(ours)), 0) + 1
                words = self._spellings(name, ours)
                spelt[words] = spelt.get(words, 0) + (words[0] != words[1])
        for (mine, theirs), number in wrapped.items():
            if mine != theirs:
                change = f"{mine!r} taken away from" if mine else f"{theirs!r} put into"
                self.notes.append(f"{change} its names ({_count(number)})")
        differing = [f"{one} read as {two} ({_count(number)})" for (one, two), number in spelt.items() if number]
        self.notes += [", ".join(differing)] if differing else []
        self.notes += refitted.notes
        return found | {self._donor_names[name]: entry for name, entry in refitted.entries.items()}

    def _spellings(self, name: str, ours: str) -> tuple[str, str]:
        """The last words of one of the expert's names and of the donor's for it, where one is not the usual one."""
        name, ours, usually, now = unwrapped(name), unwrapped(ours), self._usual[name], self._names[name]
        return spelling(name, usually) or spelling(now, ours), spelling(ours, now) or spelling(usually, name)

    def _current(self) -> dict[str, TensorEntry]:
        return {self._names[name]: entry for name, entry in self._expert.items()}

    def _move(self, name: str, new: str) -> bool:
        """Give one of the expert's tensors another name; a name that is taken stays as it is."""
        old = self._names[name]
        if new == old or new in self._taken:
            return False
        self._taken.remove(old)
        self._taken.add(new)
        self._names[name] = new
        return True


def _wrappers(name: str) -> str:
    """Words of modules that tools have put around others in a name, as they stand there."""
    return "".join(f"{word}." for word in name.split(".") if word in WRAPPERS)


def _count(number: int) -> str:
    return f"{number} tensor{'' if number == 1 else 's'}"
