"""Names that differ by one prefix: `model.layers.0...` in one checkpoint, `layers.0...` in another. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prefix:
    """A prefix, with its last dot, that an expert's names lack (`added`) or have beyond the base's."""

    text: str
    added: bool

    def source(self, name: str) -> str | None:
        """The expert's name for the base's `name`, None if the prefix has no part in it."""
        if not self.added:
            return self.text + name
        return name[len(self.text) :] if name.startswith(self.text) else None

    def describe(self) -> str:
        return f"{self.text!r} {'put before' if self.added else 'taken away from'} its names"


class AmbiguousPrefix(ValueError):
    """More than one prefix would do."""


def find_prefix(needed: Shapes, theirs: Shapes) -> Prefix | None:
    """The one prefix by which an expert has all the needed names; None if it has them as they are, or by no prefix.

    Where several would do, shapes decide; AmbiguousPrefix if they do not, or if a tensor is there both with
    and without the prefix.
    """
    if all(name in theirs for name in needed):
        return None
    whole = [prefix for prefix, _ in _candidates(needed, theirs).items() if _covers(prefix, needed, theirs)]
    if len(whole) > 1:
        fitting = [prefix for prefix in whole if _shapes_fit(prefix, needed, theirs)]
        whole = fitting if len(fitting) == 1 else whole
    if len(whole) > 1:
        raise AmbiguousPrefix(", or ".join(sorted(prefix.describe() for prefix in whole)))
    if not whole:
        return None
    twice = [name for name in needed if name in theirs and whole[0].source(name) in theirs]
    if twice:
        raise AmbiguousPrefix(f"{whole[0].describe()}, but it has {twice[0]!r} with and without")
    return whole[0]


def nearest_prefix(needed: Shapes, theirs: Shapes) -> tuple[Prefix, int] | None:
    """The prefix by which most of the needed names are there, and their number; None if there is none."""
    counts = _candidates(needed, theirs)
    return max(counts.items(), key=lambda item: (item[1], item[0].text)) if counts else None


def renamed(prefix: Prefix, base: Shapes, theirs: Mapping[str, object]) -> dict[str, str]:
    """The base's name for each of the expert's; names that the prefix does not bring to one of the base stay."""
    ours = {prefix.source(name): name for name in base if name not in theirs}
    return {name: ours.get(name, name) for name in theirs}


def _candidates(needed: Shapes, theirs: Shapes) -> Counter[Prefix]:
    """Every prefix that brings a name of one side to a missing one of the other, with how many."""
    missing = {name for name in needed if name not in theirs}
    found = [Prefix(text, False) for name in theirs for text, rest in _split(name) if rest in missing]
    found += [Prefix(text, True) for name in missing for text, rest in _split(name) if rest in theirs]
    return Counter(found)


def _split(name: str) -> Iterator[tuple[str, str]]:
    position = name.find(".")
    while position >= 0:
        yield name[: position + 1], name[position + 1 :]
        position = name.find(".", position + 1)


def _covers(prefix: Prefix, needed: Shapes, theirs: Shapes) -> bool:
    return all(name in theirs or prefix.source(name) in theirs for name in needed)


def _shapes_fit(prefix: Prefix, needed: Shapes, theirs: Shapes) -> bool:
    found = {name: theirs.get(prefix.source(name) or "", theirs.get(name)) for name in needed}
    return all(found[name] == shape for name, shape in needed.items())
