"""Parameters that one version of a library calls otherwise than the next, in modules of the same name. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# Last words of two parameters of one module, and those that they have elsewhere. One gamma alone is the scale of a
# layer, unless its module is called a norm.
_NORM = ((".gamma", ".beta"), (".weight", ".bias"))
_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def respelt(base: Shapes, theirs: Shapes) -> dict[str, str]:
    """The base's name for each of the expert's names that is spelt otherwise: of the same module, and shape."""
    found: dict[str, str] = {}
    for one, two in (_NORM, _WEIGHT_NORM):
        for old, new in ((one, two), (two, one)):
            for name in theirs:
                stem = name.removesuffix(old[0])
                if stem == name or not _same(stem, old[0], new[0], base, theirs):
                    continue
                partner = stem + old[1] in theirs or (stem + new[1] in base and stem + new[1] not in theirs)
                if partner and _same(stem, old[1], new[1], base, theirs):
                    found |= {stem + old[0]: stem + new[0], stem + old[1]: stem + new[1]}
                elif not partner and one in _NORM and "norm" in stem.rpartition(".")[2].lower():
                    found[stem + old[0]] = stem + new[0]
    return found


def _same(stem: str, old: str, new: str, base: Shapes, theirs: Shapes) -> bool:
    """Whether a parameter is the expert's by one name alone and the base's by the other alone, in one shape."""
    ours, mine = stem + new, stem + old
    return mine in theirs and mine not in base and ours in base and ours not in theirs and base[ours] == theirs[mine]
