"""Modules of an adapter in its base: by their names, or refused with those that they may be."""

from __future__ import annotations

from pathlib import Path

from pymerge.adapters.experts import NUMBERED, SWITCHED
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Keys, modules_of
from pymerge.adapters.memory_names import modules_in_memory
from pymerge.adapters.names import AmbiguousModule, Placed, place
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError


def place_modules(base: Checkpoint, files: AdapterFiles, keys: Keys) -> Placed:
    """Find the modules of an adapter in its base.

    Raises CheckpointError where they fit in several ways, or factors and rows have no place.
    """
    wanted = [*(name for name, _ in keys.modules), *keys.tokens]
    wanted = wanted or [name.rpartition(".")[0] for name in keys.values]
    known = set(modules_of(base.tensors))
    try:
        placed = place(wanted, known)
        single = {name: experts for name in placed.lost if (experts := _experts(name))}
        stacks = place(single.values(), known) if single else Placed({})
    except AmbiguousModule as error:
        memory = modules_in_memory(base)
        if not all(name in memory for name in wanted):
            raise CheckpointError(
                f"{files.file}: its modules fit {base.path} in more than one way: {error}; {files.merged_elsewhere}"
            ) from error
        placed, single, stacks = Placed({name: memory[name] for name in wanted}), {}, Placed({})
    modules = dict(placed.modules)
    for name, experts in single.items():
        if experts in stacks.modules:
            last = name.rpartition(".")[2] if SWITCHED.fullmatch(name) else name[len(experts) + 1 :]
            modules[name] = f"{stacks.modules[experts]}.{last}"
    lost = [name for name in placed.lost if name not in modules]
    if lost and (keys.modules or keys.tokens):
        others = [name.rpartition(".")[0] for name in keys.values]
        modules |= _by_memory(base, [*lost, *(name for name in others if name not in known)])
        _refuse_lost(base, files, keys, [name for name in lost if name not in modules])
    else:
        found = Placed(modules, (), placed.beginning)
        modules |= _whole_by_memory(base, [name for name in keys.values if found.name(name) not in base.tensors])
    return Placed(modules, (), placed.beginning)


def _experts(name: str) -> str | None:
    """The module of all experts that one is in, or that mlx-lm has stacks of."""
    if found := NUMBERED.fullmatch(name):
        return found["experts"]
    found = SWITCHED.fullmatch(name)
    return f"{found['around']}.experts" if found else None


def _by_memory(base: Checkpoint, lost: list[str]) -> dict[str, str]:
    """Modules under the names that transformers has for them in memory; what is in no or in several places is left."""
    memory = modules_in_memory(base)
    found: dict[str, str] = {}
    for name in dict.fromkeys(lost):
        try:
            found |= {old: memory[new] for old, new in place([name], memory).modules.items()}
        except AmbiguousModule:
            continue
    return found


def _whole_by_memory(base: Checkpoint, lost: list[str]) -> dict[str, str]:
    """Modules of whole tensors that have the very names that transformers has for them in memory, as the head of
    GPT-NeoX. Another head must not be taken for one that ends alike."""
    memory = modules_in_memory(base) if lost else {}
    names = dict.fromkeys(name.rpartition(".")[0] for name in lost)
    return {name: memory[name] for name in names if name in memory}


def _refuse_lost(base: Checkpoint, files: AdapterFiles, keys: Keys, lost: list[str]) -> None:
    """Raise CheckpointError if modules are not in the base, with those that they may be there."""
    if not lost:
        return
    found = next((module for (name, _), module in keys.modules.items() if name == lost[0]), None)
    alike = ""
    if found is not None:
        sizes = [(found.b.shape[0], *found.a.shape[1:]), (*found.a.shape[1:], found.b.shape[0])]
        numbers = [word for word in lost[0].split(".") if word.isdecimal()]
        same = [
            name
            for name, entry in base.tensors.items()
            if entry.shape in sizes and [word for word in name.split(".") if word.isdecimal()] == numbers
        ]
        alike = f"; of its size there are {first_few(same, 6)}" if same else ""
    raise CheckpointError(
        f"{files.file}: adapts {first_few(lost)}, which {base.path} has not{alike}; name the model that "
        f"it is for, or {files.merged_elsewhere}"
    )


def may_be(said: str, base: Checkpoint) -> bool:
    """Whether a name in a config may well be that of the base: the same path, the same last word, or its repository."""
    path = Path(said).expanduser()
    if path.exists() and path.resolve() == base.path.resolve():
        return True
    words = [base.origin.partition("@")[0], *base.path.parts]
    last = said.rstrip("/").rpartition("/")[2]
    return (
        said in words
        or last in (base.path.name, base.origin.partition("@")[0].rpartition("/")[2])
        or (f"models--{said.replace('/', '--')}" in words)
    )
