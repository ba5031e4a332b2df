"""Parameters that one version of a library calls otherwise than the next, in modules of the same name. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# Last words of two parameters of one module, and those that they have elsewhere.
_NORM = ((".gamma", ".beta"), (".weight", ".bias"))
_PARAMETRIZED = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
_WEIGHT_NORM = ((".weight_g", ".weight_v"), _PARAMETRIZED)


def respelt(base: Shapes, theirs: Shapes) -> dict[str, str]:
    """The base's name for each of the expert's names that is spelt otherwise: of the same module, and shape.

    A gamma alone may be the scale of a layer: it is a norm's weight beside its beta, or in a module that is called a
    norm.
    """
    found: dict[str, str] = {}
    for one, two in (_NORM, _WEIGHT_NORM):
        for old, new in ((one, two), (two, one)):
            for name in theirs:
                which = next((i for i in (0, 1) if name.endswith(old[i])), None)
                if which is None:
                    continue
                stem = name.removesuffix(old[which])
                known = one is _WEIGHT_NORM[0] or "norm" in stem.rpartition(".")[2].lower()
                both = known or _same(stem, old[1 - which], new[1 - which], base, theirs)
                if both and _same(stem, old[which], new[which], base, theirs):
                    found[name] = stem + new[which]
    return found


def _same(stem: str, old: str, new: str, base: Shapes, theirs: Shapes) -> bool:
    """Whether a parameter is the expert's by one name alone and the base's by the other alone, in one shape."""
    ours, mine = stem + new, stem + old
    return mine in theirs and mine not in base and ours in base and ours not in theirs and base[ours] == theirs[mine]
