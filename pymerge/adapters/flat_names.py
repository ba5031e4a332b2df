"""Modules of a base by names in which _ stands for dots, too, as kohya's scripts write them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from pymerge.adapters.names import AmbiguousModule, Placed

_Inside = Mapping[str, list[str]]  # modules by what is behind their beginning, with _ for dots


def place_flat(wanted: Collection[str], known: Iterable[str]) -> Placed:
    """Find modules by such names among those `known` of a base.

    All lie in one module of the base, or have one beginning too much; where some have no place, most have one. Raises
    AmbiguousModule where several would do.
    """
    inside = _by_beginning(known)
    ways = _ways(wanted, inside, "")
    for end in re.finditer("_", min(wanted)):
        ways = ways or _ways(wanted, inside, min(wanted)[: end.end()])
    if len(ways) > 1:
        first = min(wanted)
        raise AmbiguousModule(f"{first} could be {' or '.join(sorted(way[first][0] for way in ways)[:4])}")
    most = ways[0] if ways else _most(wanted, inside)
    for name, modules in most.items():
        if len(modules) > 1:
            raise AmbiguousModule(f"{name} could be {' or '.join(sorted(modules)[:4])}")
    return Placed({name: module for name, (module,) in most.items()}, tuple(set(wanted) - most.keys()))


def _by_beginning(known: Iterable[str]) -> dict[str, _Inside]:
    found: dict[str, dict[str, list[str]]] = {}
    for module in known:
        for at in (0, *(dot.end() for dot in re.finditer(r"\.", module))):
            names = found.setdefault(module[:at], {})
            names.setdefault(module[at:].replace(".", "_"), []).append(module)
    return dict(found)


def _ways(wanted: Collection[str], inside: Mapping[str, _Inside], taken: str) -> list[_Inside]:
    """All ways in which every module has a place, without a beginning of its name."""
    if not all(name.startswith(taken) for name in wanted):
        return []
    short = {name: name[len(taken) :] for name in wanted}
    return [
        {name: names[rest] for name, rest in short.items()}
        for names in inside.values()
        if all(rest in names for rest in short.values())
    ]


def _most(wanted: Collection[str], inside: Mapping[str, _Inside]) -> _Inside:
    found: _Inside = {}
    for names in inside.values():
        own = {name: names[name] for name in wanted if name in names}
        found = own if len(own) > len(found) else found
    return found
