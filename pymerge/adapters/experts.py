"""Stacks of experts: parameters of three axes that PEFT adapts with one pair of factors, and how files hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pymerge.adapters.factors import Matrix
from pymerge.adapters.keys import Module
from pymerge.adapters.low_rank import Term
from pymerge.checkpoint.safetensors_file import TensorEntry

NUMBERED = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<name>\w+)")
# What mlx-lm makes of the experts of a block: a module with a stack for each of their matrices.
SWITCHED = re.compile(r"(?P<around>.*)\.switch_mlp\.(?P<name>\w+)")
# Names of an expert's matrices in files, by the parameter that stacks them in memory, the upper one first.
_STACKED = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter E x p x q. Files hold it as one `stack`, or as `parts` of each expert, one above the other."""

    name: str
    shape: tuple[int, int, int]
    stack: str = ""
    parts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Fit:
    """Factors of a module, and the parameter that they adapt: E x outputs x inputs if `swapped`, else transposed."""

    module: Module
    parameter: ExpertParameter
    swapped: bool


def stacks_of(tensors: Mapping[str, TensorEntry]) -> dict[str, list[ExpertParameter]]:
    """Parameters of three axes by their modules, in the order in which transformers registers them."""
    found: dict[str, list[ExpertParameter]] = {}
    for name, entry in tensors.items():
        if len(entry.shape) == 3:
            module, _, last = name.rpartition(".")
            shape = entry.shape[0], entry.shape[1], entry.shape[2]
            found.setdefault(module, []).append(ExpertParameter(last, shape, name))
    for parameters in found.values():
        parameters.sort(key=lambda each: ("down" in each.name, each.name))
    return found


def in_memory(module: str, tensors: Mapping[str, TensorEntry]) -> Iterator[ExpertParameter]:
    """The parameters that transformers makes of experts that files hold one by one."""
    for name, spellings in _STACKED.items():
        for words in spellings:
            parts: list[tuple[str, ...]] = []
            while all(f"{module}.{len(parts)}.{word}.weight" in tensors for word in words):
                parts.append(tuple(f"{module}.{len(parts)}.{word}.weight" for word in words))
            shapes = {tensors[tensor].shape for each in parts for tensor in each}
            if len(shapes) == 1 and len(shape := shapes.pop()) == 2:
                yield ExpertParameter(name, (len(parts), len(words) * shape[0], shape[1]), "", tuple(parts))


def assign(
    modules: Sequence[Module],
    parameters: Sequence[ExpertParameter],
    wanted: Sequence[str],
    transposed: Callable[[str], bool | None],
) -> list[Fit] | None:
    """The parameter of each of the factors around one module; None if none fits, or several do.

    Args:
        modules: with the same name; the innermost is of the parameter that was registered first.
        parameters: of that module.
        wanted: target_parameters of the adapter's config.
        transposed: whether matrices of a stack are stored as inputs x outputs, None if that is unknown.
    """
    modules = sorted(modules, key=lambda module: -module.depth)
    named = [each for each in parameters if any(f".{name}".endswith(f".{each.name}") for name in wanted)]
    for offered in (named, list(parameters)) if named else (list(parameters),):
        fits = [[each for each in offered if _ways(module, each)] for module in modules]
        if len(modules) == len(offered) and all(each in fit for each, fit in zip(offered, fits, strict=True)):
            chosen = offered
        elif all(len(fit) == 1 for fit in fits) and len({fit[0].name for fit in fits}) == len(fits):
            chosen = [fit[0] for fit in fits]
        else:
            continue
        return [_fit(module, each, transposed) for module, each in zip(modules, chosen, strict=True)]
    return None


def _ways(module: Module, parameter: ExpertParameter) -> list[bool]:
    """Whether factors fit swapped, as they are, both or none."""
    count, rows, columns = parameter.shape
    stored, size = module.a.shape, (module.b.shape[0], module.a.shape[1])
    if len(stored) != 2 or len(module.b.shape) != 2 or stored[0] % count or module.b.shape[1] != stored[0]:
        return []
    return [swapped for swapped in (True, False) if size == ((rows, columns) if swapped else (columns, rows))]


def _fit(module: Module, parameter: ExpertParameter, transposed: Callable[[str], bool | None]) -> Fit:
    ways = _ways(module, parameter)
    if len(ways) > 1 and parameter.stack and transposed(parameter.stack):
        return Fit(module, parameter, False)
    return Fit(module, parameter, ways[0])


def terms(fit: Fit, scale: float) -> Iterator[tuple[str, Term]]:
    """Terms that are added to stored tensors, with the names of these."""
    count, rows, _ = fit.parameter.shape
    for number in range(count):
        names = (fit.parameter.stack,) if fit.parameter.stack else fit.parameter.parts[number]
        height = rows // len(names)
        for at, name in enumerate(names):
            left, right = _factors(fit, number, count, (at * height, (at + 1) * height))
            yield name, Term(left, right, scale, 0, number if fit.parameter.stack else 0)


def _factors(fit: Fit, number: int, count: int, rows: tuple[int, int]) -> tuple[Matrix, Matrix]:
    """Factors of some rows of one expert: of A the rows of this expert, of B every count-th column."""
    a, b = fit.module.a, fit.module.b
    rank = a.shape[0] // count
    ranks, own, part = (number * rank, (number + 1) * rank, 1), (number, b.shape[1], count), (*rows, 1)
    if fit.swapped:
        return Matrix(b, part, own), Matrix(a, ranks, (0, a.shape[1], 1))
    return Matrix(a, ranks, part, True), Matrix(b, (0, b.shape[0], 1), own, True)


def in_stack(module: Module, experts: str, tensors: Mapping[str, TensorEntry], scale: float) -> tuple[str, Term] | None:
    """Term that factors of a single expert add to the stack that the base has of all; None if they do not fit."""
    found = NUMBERED.fullmatch(module.name)
    if found is None:
        return None
    return _in_stack(module, found["name"], int(found["number"]), experts, tensors, scale)


def _in_stack(
    module: Module, word: str, number: int, experts: str, tensors: Mapping[str, TensorEntry], scale: float
) -> tuple[str, Term] | None:
    for name, spellings in _STACKED.items():
        words = next((words for words in spellings if word in words), None)
        entry = tensors.get(f"{experts}.{name}")
        if words is None or entry is None or len(entry.shape) != 3:
            continue
        count, rows, columns = entry.shape
        size = (module.left.shape[0], module.right.shape[1])
        if size == (rows // len(words), columns) and number < count:
            return f"{experts}.{name}", Term(module.left, module.right, scale, words.index(word) * size[0], number)
    return None


def switched(
    module: Module, where: str, tensors: Mapping[str, TensorEntry], scale: float
) -> list[tuple[str, Term]] | None:
    """Terms of factors of all experts, E x rank x inputs and E x outputs x rank, with the tensors that they are added
    to: one stack, matrices of single experts, or the stack that transformers makes; None if they do not fit."""
    count, rank, columns = module.a.shape
    rows = module.b.shape[1]
    if module.b.shape != (count, rows, rank):
        return None
    each = [
        replace(module, fields={"lora_A": _matrix(module.a, e), "lora_B": _matrix(module.b, e)}, turned=False)
        for e in range(count)
    ]
    own = f"{where}.weight"
    if own in tensors:
        fits = tensors[own].shape == (count, rows, columns)
        return [(own, Term(one.left, one.right, scale, 0, e)) for e, one in enumerate(each)] if fits else None
    experts, _, word = where.rpartition(".")
    spelled = next(
        (f"{experts}.{{}}.{one}.weight" for one in _alike(word) if f"{experts}.0.{one}.weight" in tensors), ""
    )
    if spelled:
        names = [spelled.format(e) for e in range(count)]
        fits = all(name in tensors and tensors[name].shape == (rows, columns) for name in names)
        fits = fits and spelled.format(count) not in tensors
        return (
            [(name, Term(one.left, one.right, scale)) for name, one in zip(names, each, strict=True)] if fits else None
        )
    found = [_in_stack(one, word, e, experts, tensors, scale) for e, one in enumerate(each)]
    whole = [one for one in found if one is not None]
    return whole if len(whole) == count == tensors[whole[0][0]].shape[0] else None


def _alike(word: str) -> tuple[str, ...]:
    """Words for a matrix of an expert in files, its own first."""
    places = [(words.index(word), spellings) for spellings in _STACKED.values() for words in spellings if word in words]
    return (word, *(words[at] for at, spellings in places for words in spellings))


def _matrix(entry: TensorEntry, number: int) -> TensorEntry:
    """One matrix of a stack, as if it were stored for itself."""
    part = entry.rows(number, number + 1)
    return replace(part, shape=entry.shape[1:], first_row=0)
