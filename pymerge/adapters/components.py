"""Adapters for several models of a pipeline in one file: what of it is for a base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from pymerge.adapters.factors import trimmed
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Module, modules_of
from pymerge.adapters.names import AmbiguousModule, Placed
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

# Modules of a component by the names that the file has for them; their base's modules by these names.
Components = Mapping[str, Mapping[str, Module]]
Finder = Callable[[Collection[str], Collection[str]], Placed]


@dataclass(frozen=True)
class _Fit:
    """A component in a base: the base's modules of its own ones, as far as their names and sizes fit."""

    modules: Mapping[str, str]
    lost: tuple[str, ...]


def for_base(
    base: Checkpoint, files: AdapterFiles, components: Components, find: Finder
) -> tuple[dict[str, Mapping[str, str]], list[str]]:
    """The components of a file that are for a base, each with the base's modules of its own, and what is left out.

    A component is for the base if all its modules are there, in their sizes. Raises CheckpointError where none is, or
    only a part of one, or where it is open which.
    """
    known = set(modules_of(base.tensors))
    fits: dict[str, _Fit] = {}
    for name, modules in components.items():
        try:
            fits[name] = _fit(base, modules, find(modules, known))
        except AmbiguousModule as error:
            raise CheckpointError(
                f"{files.file}: its modules of {name or 'the model'} fit {base.path} in more than one way: {error}; "
                f"{files.merged_elsewhere}"
            ) from error
    named = [name for name in fits if name == base.path.name]
    whole = [name for name in named or fits if not fits[name].lost]
    taken: dict[str, str] = {}
    for name in whole:
        for module in fits[name].modules.values():
            if taken.setdefault(module, name) != name:
                raise CheckpointError(
                    f"{files.file}: has modules of {taken[module]} and of {name}, and both fit {base.path}; call its "
                    "folder as the pipeline does, or keep one of them in the file"
                )
    others = [name for name in fits if name not in whole]
    in_part = [name for name in others if set(fits[name].modules.values()) - taken.keys()]
    if not whole or (len(whole) > 1 and others) or in_part:
        raise _not_there(base, files, components, fits, (not whole and named) or in_part or others)
    notes = [
        f"{files.file}: {len(components[name])} modules of {name} ({first_few(components[name])}) are left out, which "
        f"{base.path} has not; merge them in a merge of that model"
        for name in others
    ]
    return {name: fits[name].modules for name in whole}, notes


def _fit(base: Checkpoint, modules: Mapping[str, Module], placed: Placed) -> _Fit:
    fitting = {}
    for name, found in placed.modules.items():
        entry = base.tensors.get(f"{found}.weight")
        if entry is not None and _has_size(modules[name], entry.shape):
            fitting[name] = found
    return _Fit(fitting, tuple(name for name in modules if name not in fitting))


def _has_size(module: Module, shape: tuple[int, ...]) -> bool:
    rows, columns = module.b.shape[0], trimmed(module.a.shape)[1:]
    return trimmed(shape) in ((rows, *columns), (*columns, rows))


def _not_there(
    base: Checkpoint, files: AdapterFiles, components: Components, fits: Mapping[str, _Fit], names: Collection[str]
) -> CheckpointError:
    """Problem of the component that fits best of those that should."""
    name = max(names, key=lambda each: len(fits[each].modules))
    lost = fits[name].lost
    first = components[name][lost[0]]
    words = set(lost[0].replace("_", ".").split("."))
    alike = [
        (len(words & set(tensor.replace("_", ".").split("."))), tensor)
        for tensor, entry in base.tensors.items()
        if _has_size(first, entry.shape)
    ]
    near = [tensor for _, tensor in sorted(alike, key=lambda each: (-each[0], each[1]))]
    size = " x ".join(map(str, (first.b.shape[0], *first.a.shape[1:])))
    there = f"of size {size} there are {first_few(near)}" if near else f"nothing there has size {size}"
    of = f" of {name}" if name else ""
    return CheckpointError(
        f"{files.file}: adapts {first_few(lost)}{of}, which {base.path} has not, or in other sizes; {there}; name the "
        "model that it is for (of a pipeline one of its folders, or the whole in one file), or "
        f"{files.merged_elsewhere}"
    )
