"""Experts of a mixture, one by one or in stacks: the one form seen as the other, for any architecture.

One by one an expert has matrices of its own (experts.3.gate_proj.weight; in Mixtral w1, w3 and w2); in stacks all
experts have one tensor (experts.down_proj, E x d_out x d_in), gate and up often above each other in gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pymerge.checkpoint.composed import can_be_cut, matrix_of, rows_of_matrix, stacked, transposed
from pymerge.checkpoint.safetensors_file import TensorEntry

Entries = Mapping[str, TensorEntry]
Parts = tuple[str, ...]

_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_JOINED: dict[str, Parts] = {"gate_up_proj": ("gate", "up"), "input_linear": ("gate", "up"), "output_linear": ("down",)}
# Families whose stacks are E x d_in x d_out: gate and up are side by side, or their columns alternate.
_SIDE_BY_SIDE = ("llama4", "aria", "qwen3_vl_moe")
_ALTERNATING = ("gpt_oss", "openai_privacy_filter")
_NOTES = {
    "split": "{} matrices of single experts are read out of its stacks of experts",
    "stacked": "{} stacks of experts are put together from its experts",
    "turned": "{} stacks of experts are read the other way round (d_in x d_out)",
    "renamed": "{} tensors of experts are matched by their place",
}


@dataclass(frozen=True)
class Refitted:
    """An expert model's experts in the base's form: entries under the base's names, instead of the `used` ones."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Experts:
    """Experts of one block: names of their matrices by number and part, and of stacks by their parts."""

    singles: dict[tuple[int, str], str] = field(default_factory=dict)
    stacks: dict[Parts, str] = field(default_factory=dict)


def refit(base: Entries, theirs: Entries, family: str) -> Refitted:
    """The experts of `theirs` that the base has in the other form, or under other words, in the same blocks.

    Args:
        family: the base's model_type.
    """
    ours, mine = _experts(base), _experts(theirs)
    found = Refitted()
    counts = dict.fromkeys(_NOTES, 0)
    for container, wanted in ours.items():
        if container not in mine:
            continue
        given = mine[container]
        ways = {name: "renamed" if key in given.singles else "split" for key, name in wanted.singles.items()}
        for parts, name in wanted.stacks.items():
            ways[name] = "turned" if name in theirs else "renamed" if parts in given.stacks else "stacked"
        lacking = [name for name in ways if name not in theirs or theirs[name].shape != base[name].shape]
        built = _build(base, theirs, wanted, given, family) if lacking else {}
        for name in lacking if built else ():
            found.entries[name] = built[name]
            counts[ways[name]] += 1
        if built:
            found.used.update({*given.singles.values(), *given.stacks.values()} - base.keys())
    found.notes.extend(note.format(counts[way]) for way, note in _NOTES.items() if counts[way])
    return found


def joined_parts(name: str, in_axis: int, outputs: int, families: Sequence[str]) -> tuple[int, bool]:
    """Number of weights that each matrix of a stack holds along d_out, and whether their rows alternate.

    Args:
        in_axis: of the stack's matrices, as that of a Role.
        outputs: d_out of the whole matrix.
        families: every model_type in config.json.
    """
    place = _place(name, 3)
    parts = len(place[2]) if place else 1
    if parts == 1 or outputs % parts:
        return 1, False
    if in_axis == 1 or any(family.startswith(_SIDE_BY_SIDE) for family in families):
        return parts, False
    return (parts, True) if any(family.startswith(_ALTERNATING) for family in families) else (1, False)


def mixture_stems(base: Entries, theirs: Entries) -> dict[str, str]:
    """The base's name of each module with experts that an expert model calls otherwise: the only one of its block."""
    stems: list[dict[str, set[str]]] = []
    for one, other in ((base, theirs), (theirs, base)):
        inside = {container.rpartition(".")[0] for container in _experts(one)}
        alone = inside - {container.rpartition(".")[0] for container in _experts(other)}
        blocks: dict[str, set[str]] = {}
        for stem in alone:
            blocks.setdefault(stem.rpartition(".")[0], set()).add(stem)
        stems.append(blocks)
    ours, mine = stems
    pairs = {block: (mine[block], ours[block]) for block in ours.keys() & mine.keys()}
    return {min(old): min(new) for old, new in pairs.values() if len(old) == len(new) == 1}


def routers(base: Entries, theirs: Entries) -> dict[str, str]:
    """The base's name for routers that are spelt otherwise: beside the experts of a module, a row for each of them, and
    the only tensors of their parameter and shape that the other model has not, on both sides."""
    ours, mine = _experts(base), _experts(theirs)
    found = {}
    for container in ours.keys() & mine.keys():
        stem = container.rpartition(".")[0]
        count = len({number for number, _ in _matrix_keys(base, ours[container])})
        missing, free = _routers(stem, count, base, theirs), _routers(stem, count, theirs, base)
        for key, names in missing.items():
            if len(names) == 1 and len(free.get(key, ())) == 1:
                found[free[key][0]] = names[0]
    return found


def _routers(stem: str, count: int, tensors: Entries, others: Entries) -> dict[tuple[object, ...], list[str]]:
    """Tensors of a module with a row for each expert that the other model has not by name, by parameter and shape."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name in tensors.keys() - others.keys():
        shape = tensors[name].shape
        if name.startswith(f"{stem}.") and len(shape) in (1, 2) and shape[0] == count and not _place(name, len(shape)):
            found.setdefault((name.rpartition(".")[2], shape), []).append(name)
    return found


def _place(name: str, axes: int) -> tuple[str, int | None, Parts] | None:
    """Path of the list of experts, number of the expert (None for a stack), and parts; None for other tensors."""
    words = name.split(".")
    if words[-1] == "weight":
        words.pop()
    if len(words) < 3:
        return None
    leaf = words[-1]
    parts = _JOINED.get(leaf, (_PARTS.get(leaf, leaf),))
    if axes == 2 and words[-2].isdecimal() and words[-3].endswith("experts"):
        return ".".join(words[:-2]), int(words[-2]), parts
    if axes == 3 and words[-2].endswith("experts"):
        return ".".join(words[:-1]), None, parts
    if axes == 3 and leaf in ("input_linear", "output_linear"):
        return ".".join([*words[:-1], "experts"]), None, parts
    return None


def _experts(tensors: Entries) -> dict[str, _Experts]:
    found: dict[str, _Experts] = {}
    for name, entry in tensors.items():
        if (place := _place(name, len(entry.shape))) is None:
            continue
        container, number, parts = place
        experts = found.setdefault(container, _Experts())
        if number is None:
            experts.stacks[parts] = name
        elif len(parts) == 1:
            experts.singles[number, parts[0]] = name
    return found


def _build(base: Entries, theirs: Entries, wanted: _Experts, given: _Experts, family: str) -> dict[str, TensorEntry]:
    """The base's tensors of one block that are to be had from the expert's; none if it is open how."""
    if _matrix_keys(base, wanted) != _matrix_keys(theirs, given) or _has_twice(theirs, given):
        return {}  # other experts, or not all of them
    turned = _turned(base, theirs, wanted, given)
    if turned is None or (turned and not family.startswith(_SIDE_BY_SIDE) and _rejoins(wanted, given)):
        return {}
    singles = {key: theirs[name] for key, name in given.singles.items()}
    for parts, name in given.stacks.items():
        if parts not in wanted.stacks:
            singles |= _cut(theirs[name], parts, _heights(base, wanted), turned)
    built = {name: singles.get(key) for key, name in wanted.singles.items()}
    for parts, name in wanted.stacks.items():
        if parts in given.stacks:
            whole = theirs[given.stacks[parts]]
            built[name] = transposed(whole) if whole.shape != base[name].shape and can_be_cut(whole) else whole
        else:
            numbers = range(base[name].shape[0])
            built[name] = _stack(name, [[singles.get((i, part)) for part in parts] for i in numbers], turned)
    found = {name: entry for name, entry in built.items() if entry is not None and entry.shape == base[name].shape}
    return found if len(found) == len(built) else {}


def _stack(name: str, matrices: list[list[TensorEntry | None]], turned: bool) -> TensorEntry | None:
    """A stack of the matrices under this name; None if one is missing, or of another dtype, or cannot be turned."""
    rows = [[matrix for matrix in parts if matrix is not None] for parts in matrices]
    flat = [matrix for parts in rows for matrix in parts]
    whole = len(flat) == sum(map(len, matrices)) > 0
    if not whole or len({matrix.dtype for matrix in flat}) > 1 or (turned and not all(map(can_be_cut, flat))):
        return None
    if turned:
        rows = [list(map(transposed, parts)) for parts in rows]
    return stacked(f"{name} of {len(flat)} matrices", rows, axis=int(turned))


def _heights(base: Entries, wanted: _Experts) -> dict[str, int]:
    """Rows (d_out) of the matrix of each part that the base has alone."""
    stacks = {parts[0]: base[name].shape[1] for parts, name in wanted.stacks.items() if len(parts) == 1}
    return stacks | {part: base[name].shape[0] for (_, part), name in wanted.singles.items()}


def _matrix_keys(tensors: Entries, experts: _Experts) -> set[tuple[int, str]]:
    """Number and part of every matrix, alone or in a stack."""
    stacks = experts.stacks.items()
    inside = {(i, part) for parts, name in stacks for part in parts for i in range(tensors[name].shape[0])}
    return inside | experts.singles.keys()


def _has_twice(tensors: Entries, experts: _Experts) -> bool:
    """Whether a matrix is there alone and in a stack, or in two of them."""
    inside = sum(len(parts) * tensors[name].shape[0] for parts, name in experts.stacks.items())
    return inside + len(experts.singles) > len(_matrix_keys(tensors, experts))


def _rejoins(wanted: _Experts, given: _Experts) -> bool:
    """Whether tensors of several parts are cut or put together."""
    return any(len(parts) > 1 for parts in wanted.stacks.keys() ^ given.stacks.keys())


def _turned(base: Entries, theirs: Entries, wanted: _Experts, given: _Experts) -> bool | None:
    """Whether stacks are d_in x d_out where single matrices are d_out x d_in; None if shapes do not tell, or neither
    fits."""
    pairs = [*_matrices(base, wanted, theirs, given), *_matrices(theirs, given, base, wanted)]
    if not pairs:
        return False
    plain = all(one == two for one, two in pairs)
    turned = all(one == two[::-1] for one, two in pairs)
    return None if plain == turned else turned


def _matrices(
    tensors: Entries, stacks: _Experts, others: Entries, singles: _Experts
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of a stack's matrix, and of what single matrices make above each other, for each stack."""
    for parts, name in stacks.stacks.items():
        shapes = [others[singles.singles[0, part]].shape for part in parts if (0, part) in singles.singles]
        if len(shapes) == len(parts):
            yield tensors[name].shape[1:], (sum(rows for rows, _ in shapes), shapes[0][1])


def _cut(
    stack: TensorEntry, parts: Parts, heights: Mapping[str, int], turned: bool
) -> Iterator[tuple[tuple[int, str], TensorEntry]]:
    """Single matrices of a stack, by expert and part."""
    if not can_be_cut(stack) or (len(parts) > 1 and not all(part in heights for part in parts)):
        return
    for number in range(stack.shape[0]):
        matrix = transposed(matrix_of(stack, number)) if turned else matrix_of(stack, number)
        if len(parts) == 1:
            yield (number, parts[0]), matrix
            continue
        at = 0
        for part in parts:
            yield (number, part), rows_of_matrix(matrix, at, at + heights[part])
            at += heights[part]
