"""Names that differ by their beginnings: `model.layers.0...` in one, `model.language_model.layers.0...` in another.

A beginning may have words more, words less, or the same words in another order; no word is ever replaced by another,
which no shape could prove. Which beginnings there are is found from names that agree from some word on, and in shape.
Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]
Words = tuple[str, ...]

_NUMBER = "*"


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
        """What it does to an expert's names."""
        old, new = ("".join(f"{word}." for word in words) for words in (self.old, self.new))
        if not new:
            return f"{old!r} taken away from its names"
        return f"{old!r} read as {new!r}" if old else f"{new!r} put before its names"


@dataclass
class _Role:
    """Names that differ in numbers only, with the shape of each."""

    words: Words
    shapes: dict[Words, tuple[int, ...]] = field(default_factory=dict)  # by their numbers


def find_renamings(base: Shapes, theirs: Shapes, wanted: Collection[str]) -> list[Renaming]:
    """The renamings, longest first, that bring an expert's names to names of the base that it lacks.

    Args:
        base: all names of the base.
        theirs: all names of the expert.
        wanted: names of the base that the expert should have.

    Raises:
        AmbiguousNames: several would bring different tensors to one name, or one that is there already.
    """
    missing = _roles({name: base[name] for name in wanted if name not in theirs})
    free = _roles({name: shape for name, shape in theirs.items() if name not in base})
    found: dict[Words, dict[Renaming, Words]] = {}  # of each role of the base: what brings which role there
    covers: dict[Renaming, set[Words]] = {}
    for role, renaming, origin in _candidates(missing, free):
        found.setdefault(role.words, {}).setdefault(renaming, origin)
        covers.setdefault(renaming, set()).add(role.words)
    chosen: dict[Renaming, None] = {}
    for words, candidates in found.items():
        best = [one for one in candidates if not any(covers[one] < covers[other] for other in candidates)]
        if len(best) > 1:
            ways = ", or ".join(sorted(renaming.describe() for renaming in best))
            raise AmbiguousNames(f"{'.'.join(words)}: {ways}")
        chosen[best[0]] = None
    ordered = sorted(chosen, key=lambda each: (-len(each.old), each.old))
    _check_targets(ordered, base, theirs)
    sound = _sound(ordered, base, theirs)
    _check_unique(sound, base, theirs)
    return sound


def rename(renamings: Sequence[Renaming], name: str, base: Shapes) -> tuple[str, Renaming | None]:
    """A name of the expert with another beginning, and the renaming: the first that brings it to one of the base, or
    else the first that fits; the name itself where none does."""
    moved = [(new, each) for each in renamings if (new := each.apply(name)) is not None]
    return next((found for found in moved if found[0] in base), moved[0] if moved else (name, None))


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


def _candidates(missing: Sequence[_Role], free: Sequence[_Role]) -> Iterator[tuple[_Role, Renaming, Words]]:
    """Roles of the base, with what could bring them, and the expert's role that it would take."""
    by_parameter: dict[str, list[_Role]] = {}
    for role in free:
        by_parameter.setdefault(role.words[-1], []).append(role)
    for role in missing:
        alike = [(other, pair) for other in by_parameter.get(role.words[-1], ()) if (pair := _pair(role, other))]
        exact = [each for each in alike if each[1][1]]
        for other, (renaming, _) in exact or alike:
            yield role, renaming, other.words


def _pair(ours: _Role, theirs: _Role) -> tuple[Renaming, bool] | None:
    """What brings their names to ours, and whether the shapes are the same; None if nothing does.

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
    """The change of the words before what is the same, if one side has all words of the other."""
    more, less = Counter(old), Counter(new)
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


def _sound(renamings: Sequence[Renaming], base: Shapes, theirs: Shapes) -> list[Renaming]:
    """Those that bring most of what begins as they say to the base, or a list of layers: one tensor of a module that is
    otherwise unlike is no evidence."""
    moved: dict[Renaming, list[str]] = {renaming: [] for renaming in renamings}
    for name in theirs:
        new, renaming = rename(renamings, name, base)
        if name not in base and renaming is not None:
            moved[renaming].append(new)
    sound = []
    for renaming in renamings:
        landed = [new for new in moved[renaming] if new in base]
        layers = any(word.isdecimal() for new in landed for word in new.split(".")[len(renaming.new) :])
        if 2 * len(landed) >= len(moved[renaming]) > 0 or layers:
            sound.append(renaming)
    return sound if len(sound) == len(renamings) else _sound(sound, base, theirs)


def _check_targets(renamings: Sequence[Renaming], base: Shapes, theirs: Shapes) -> None:
    """Raise AmbiguousNames where one beginning has two, of which each would bring a tensor to a name of the base."""
    several = {one.old for one in renamings for other in renamings if one.old == other.old and one.new != other.new}
    for name in theirs if several else ():
        ways = {each.apply(name) for each in renamings if each.old in several} & base.keys()
        if name not in base and len(ways) > 1:
            raise AmbiguousNames(f"its {name} could be {', or '.join(sorted(map(str, ways)))}")


def _check_unique(renamings: Sequence[Renaming], base: Shapes, theirs: Shapes) -> None:
    origins: dict[str, str] = {}
    for name in theirs:
        new, renaming = rename(renamings, name, base)
        if name in base or renaming is None or new not in base:
            continue
        if new in theirs:
            raise AmbiguousNames(f"{renaming.describe()}, but it has {new!r} with and without")
        if origins.setdefault(new, name) != name:
            raise AmbiguousNames(f"{new}: its {origins[new]}, or its {name}")
