"""Names that differ by their beginnings: `model.layers.0...` in one, `model.language_model.layers.0...` in another.

A beginning may have words more, words less, or the same words in another order; no word is ever replaced by another,
which no shape could prove. Which beginnings there are is found from names that agree from some word on, and in shape.
Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pymerge.architecture.spellings import WRAPPERS

Shapes = Mapping[str, tuple[int, ...]]
Words = tuple[str, ...]

_NUMBER = "*"
# Modules that tools put around a model: of data parallelism, and those that may be inside.
_WRAPPERS = ("module", *WRAPPERS)


class AmbiguousNames(ValueError):
    """More than one renaming would do."""


@dataclass(frozen=True)
class Renaming:
    """The words at the beginning of an expert's names, and the base's instead; * stands for a number, kept in order."""

    old: Words
    new: Words

    def apply(self, name: str) -> str | None:
        """The name with the base's beginning; None if it begins otherwise."""
        words = name.split(".")
        start = words[: len(self.old)]
        if len(start) < len(self.old) or not all(map(_fits, self.old, start)):
            return None
        numbers = iter([word for pattern, word in zip(self.old, start, strict=True) if pattern == _NUMBER])
        new = [next(numbers) if word == _NUMBER else word for word in self.new]
        return ".".join([*new, *words[len(self.old) :]])

    def describe(self) -> str:
        """Words for what it does to an expert's names."""
        old, new = ("".join(f"{word}." for word in words) for words in (self.old, self.new))
        if not new:
            return f"{old!r} taken away from its names"
        return f"{old!r} read as {new!r}" if old else f"{new!r} put before its names"


@dataclass
class _Role:
    """Names that differ in numbers only, with the shape of each."""

    words: Words
    shapes: dict[Words, tuple[int, ...]] = field(default_factory=dict)  # by their numbers


class Renamings:
    """Renamings that bring an expert's names to those of the base."""

    def __init__(self, each: Sequence[Renaming], base: Shapes) -> None:
        self.each = sorted(each, key=lambda renaming: (-len(renaming.old), renaming.old))
        self._base = base
        self._modules = (
            {name[:end] for name in base for end, letter in enumerate(name) if letter == "."} if each else set()
        )

    def of(self, name: str) -> tuple[str, Renaming | None]:
        """The name with another beginning, and the renaming: the one that brings it to a name of the base, or else
        deepest into its modules, the longest of several; the name itself where none fits."""
        moved = [(new, each) for each in self.each if (new := each.apply(name)) is not None]
        return max(moved, key=lambda found: self._depth(found[0]), default=(name, None))

    def _depth(self, name: str) -> tuple[bool, int]:
        ends = (end for end, letter in enumerate(name) if letter == "." and name[:end] in self._modules)
        return name in self._base, max(ends, default=0)


def find_renamings(base: Shapes, theirs: Shapes, wanted: Collection[str]) -> Renamings:
    """The renamings that bring an expert's names to names of the base that it lacks.

    Args:
        base: all names of the base.
        theirs: all names of the expert.
        wanted: names of the base that the expert should have.

    Raises:
        AmbiguousNames: several would bring different tensors to one name, or one that is there already.
    """
    lacking = {name: base[name] for name in wanted if name not in theirs}
    free = {name: shape for name, shape in theirs.items() if name not in base}
    found: dict[Words, dict[Renaming, None]] = {}  # of each role of the base: what brings a role there
    covers: dict[Renaming, set[Words]] = {}
    takes: dict[Renaming, set[Words]] = {}
    for words, renaming, origin in _candidates(_roles(lacking), _roles(free)):
        found.setdefault(words, {})[renaming] = None
        covers.setdefault(renaming, set()).add(words)
        takes.setdefault(renaming, set()).add(origin)
    chosen: dict[Renaming, None] = {}
    for words, candidates in found.items():
        best = [one for one in candidates if not any(covers[one] < covers[other] for other in candidates)]
        if len(best) > 1:
            ways = ", or ".join(sorted(renaming.describe() for renaming in best))
            raise AmbiguousNames(f"{'.'.join(words)}: {ways}")
        chosen[best[0]] = None
    # Of two that begin alike, one that takes all that the other does, and more, is the one that is meant.
    meant = [one for one in chosen if not any(one.old == other.old and takes[one] < takes[other] for other in chosen)]
    _check_targets(meant, base, free)
    sound = _sound(Renamings(meant, base), base, lacking, free)
    _check_unique(sound, base, theirs, free)
    return sound


def nearest(base: Shapes, theirs: Shapes, missing: Iterable[str]) -> str:
    """Candidates for the first of the missing names that has any, for an error: of the same parameter and shape."""
    free = [name for name in theirs if name not in base]
    for name in missing:
        if len(base[name]) < 2:
            continue  # vectors of one length are many
        last = name.split(".")[-2:]
        same = [other for other in free if theirs[other] == base[name] and other.split(".")[-1] == last[-1]]
        alike = [other for other in same if other.split(".")[-2:] == last] or (same if len(same) <= 2 else [])
        if alike:
            more = f" and {len(alike) - 2} more" if len(alike) > 2 else ""
            return f" (of the shape of {name} it has {', '.join(alike[:2])}{more}, which may be another tensor)"
    return ""


def _fits(pattern: str, word: str) -> bool:
    return word.isdecimal() if pattern == _NUMBER else word == pattern


def _roles(shapes: Shapes) -> list[_Role]:
    found: dict[Words, _Role] = {}
    for name, shape in shapes.items():
        words = name.split(".")
        numbers = tuple(word for word in words if word.isdecimal())
        key = tuple(_NUMBER if word.isdecimal() else word for word in words)
        found.setdefault(key, _Role(key)).shapes[numbers] = shape
    return list(found.values())


def _candidates(missing: Sequence[_Role], free: Sequence[_Role]) -> Iterator[tuple[Words, Renaming, Words]]:
    """Roles of the base, with what could bring one of the expert's there, and that one."""
    by_parameter: dict[str, list[_Role]] = {}
    for role in free:
        by_parameter.setdefault(role.words[-1], []).append(role)
    for role in missing:
        alike = [(pair, other) for other in by_parameter.get(role.words[-1], ()) if (pair := _pair(role, other))]
        exact = [each for each in alike if each[0][1]]
        for (renaming, _), other in exact or alike:
            yield role.words, renaming, other.words


def _pair(ours: _Role, theirs: _Role) -> tuple[Renaming, bool] | None:
    """Renamings that bring their names to ours, and whether the shapes are the same; None if nothing does.

    A single matrix may have another number of rows: a table of tokens.
    """
    same = next(
        (i for i, (one, two) in enumerate(zip(ours.words[::-1], theirs.words[::-1], strict=False)) if one != two),
        min(len(ours.words), len(theirs.words)),
    )
    if same < min(2, len(ours.words), len(theirs.words)):
        return None
    old, new = theirs.words[:-same], ours.words[:-same]
    renaming = _renaming(old, new, ours, theirs)
    if renaming is None:
        return None
    # Numbers that became words of the renaming are those of no block.
    skipped = old.count(_NUMBER) - renaming.old.count(_NUMBER), new.count(_NUMBER) - renaming.new.count(_NUMBER)
    there = {numbers[skipped[0] :]: shape for numbers, shape in theirs.shapes.items()}
    here = {numbers[skipped[1] :]: shape for numbers, shape in ours.shapes.items()}
    pairs = [(here[numbers], there[numbers]) for numbers in here.keys() & there.keys()]
    if not pairs:
        return None
    if all(one == two for one, two in pairs):
        return renaming, True
    one, two = pairs[0]
    return (renaming, False) if len(here) == 1 and len(one) == len(two) == 2 and one[1] == two[1] else None


def _renaming(old: Words, new: Words, ours: _Role, theirs: _Role) -> Renaming | None:
    """The change of the words before what is the same, if one side has all words of the other, but for wrappers."""
    more, less = (Counter(word for word in words if word not in _WRAPPERS) for words in (old, new))
    if more[_NUMBER] == less[_NUMBER]:
        return Renaming(old, new) if more <= less or less <= more else None
    # A number that is always the same is a word: the 0.auto_model. of a list of modules.
    if old and new:
        return None
    words, shapes = (old, theirs.shapes) if old else (new, ours.shapes)
    numbers = {each[: words.count(_NUMBER)] for each in shapes}
    if len(numbers) > 1:
        return None
    literal = iter(numbers.pop())
    plain = tuple(next(literal) if word == _NUMBER else word for word in words)
    return Renaming(plain, ()) if old else Renaming((), plain)


def _sound(renamings: Renamings, base: Shapes, lacking: Shapes, free: Shapes) -> Renamings:
    """Renamings that bring layers to the base, or most of what begins as they say: one tensor of a module that is
    otherwise unlike is no evidence. Where nothing is taken away, all names begin so; then the base's modules there
    count."""
    moved: dict[Renaming, list[str]] = {renaming: [] for renaming in renamings.each}
    for name in free:
        new, renaming = renamings.of(name)
        if renaming is not None:
            moved[renaming].append(new)
    there = {new for names in moved.values() for new in names if new in base}
    sound = []
    for renaming, names in moved.items():
        landed = [new for new in names if new in base]
        most = 2 * len(landed) >= len(names)
        if not renaming.old:
            most = 2 * len(_children(there, renaming.new)) >= len(_children(lacking, renaming.new))
        if landed and (most or any(word.isdecimal() for new in landed for word in new.split("."))):
            sound.append(renaming)
    if len(sound) == len(renamings.each):
        return renamings
    return _sound(Renamings(sound, base), base, lacking, free)


def _children(names: Iterable[str], beginning: Words) -> set[str]:
    """The words that follow a beginning in these names."""
    inside = "".join(f"{word}." for word in beginning)
    return {name[len(inside) :].partition(".")[0] for name in names if name.startswith(inside)}


def _check_targets(renamings: Sequence[Renaming], base: Shapes, free: Shapes) -> None:
    """Raise AmbiguousNames where one beginning has two, of which each would bring a tensor to a name of the base."""
    several = {one.old for one in renamings for other in renamings if one.old == other.old and one.new != other.new}
    for name in free if several else ():
        ways = {each.apply(name) for each in renamings if each.old in several} & base.keys()
        if len(ways) > 1:
            raise AmbiguousNames(f"its {name} could be {', or '.join(sorted(map(str, ways)))}")


def _check_unique(renamings: Renamings, base: Shapes, theirs: Shapes, free: Shapes) -> None:
    """Raise AmbiguousNames where two tensors would get one name of the base, or one that the expert has already."""
    origins: dict[str, str] = {}
    for name in free:
        new, renaming = renamings.of(name)
        if renaming is None or new not in base:
            continue
        if new in theirs:
            raise AmbiguousNames(f"{renaming.describe()}, but it has {new!r} with and without")
        if origins.setdefault(new, name) != name:
            raise AmbiguousNames(f"{new}: its {origins[new]}, or its {name}")
