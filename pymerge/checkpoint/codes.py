"""Codes in place of weights, found by structure: from dtypes, shapes and what stands beside a tensor.

An integer tensor that is named as a weight is one of codes, whoever wrote it, and so is one with a scale beside it; an
8-bit float is a number like any other, until it has a scale. Tables and masks of integers are neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pymerge.common.dtypes import ITEM_SIZES, is_float, is_float8

Described = Mapping[str, tuple[str, Sequence[int]]]  # name -> dtype code and shape

# Last words of names of weights, and of the codes that stand for one.
_WEIGHTS = {"weight", "weights", "kernel", "qweight", "wq", "packed", "qdata", "data", "codes", "blocks"}
# A name with one of these says that it is a scale; the others say of what, or of which kind.
_SCALES = {"scale", "scales", "scaler", "scaling", "absmax", "amax", "wscale"}
_OF_SCALES = {"inv", "inverse", "global", "block", "group", "channel", "tensor", "input", "output", "act", "max", "min"}
_OF_SCALES |= {"zero", "zeros", "point", "offset", "1", "2"}
# Of two axes or more, but nothing to multiply with: positions, maps from tokens or experts, masks (GPT-2's is "bias").
_TABLES = {
    "ids",
    "id",
    "idx",
    "index",
    "indices",
    "idxs",
    "position",
    "positions",
    "pos",
    "mask",
    "masks",
    "map",
    "maps",
}
_TABLES |= {"table", "tables", "perm", "layout", "bias", "shape", "lookup", "order", "zero", "point", "zeros", "qzeros"}
# Beside a weight in models of plain numbers: no scale, though it has the shape of one.
_PLAIN = {"bias", "biases", "beta", "gamma", "g", "original0", "token", "embed", "embedding", "running", "mean", "var"}
_PLAIN |= {"mask", "eps"}


class Codes(NamedTuple):
    """A tensor of codes and, if one is known, the scale that makes numbers of them."""

    name: str
    dtype: str
    scale: str | None


def find_codes(tensors: Described) -> Iterator[Codes]:
    """Tensors whose numbers are no weights: integers and booleans that stand for some, 8-bit floats with a scale."""
    suspects = [name for name, (dtype, shape) in tensors.items() if shape and (not is_float(dtype) or is_float8(dtype))]
    if not suspects:
        return
    beside = _Beside(tensors)
    for name in suspects:
        dtype, shape = tensors[name]
        scale = beside.scale_of(name)
        more = scale is not None and math.prod(shape) > math.prod(tensors[scale][1])
        if scale is not None and (is_float8(dtype) or _may_be_codes(name, dtype, shape, more)):
            yield Codes(name, dtype, scale)
        elif not is_float(dtype) and _is_weight_name(name) and (len(shape) > 1 or ITEM_SIZES[dtype] < 4):
            yield Codes(name, dtype, None)


def _may_be_codes(name: str, dtype: str, shape: Sequence[int], more: bool) -> bool:
    """Whether integers are what a scale beside them, of fewer numbers if `more`, scales: no masks, no indices."""
    if _is_weight_name(name):
        return True
    mask = dtype == "BOOL" or (len(shape) > 2 and set(shape[:-2]) == {1} and shape[-1] == shape[-2])
    if mask or not _TABLES.isdisjoint(words(name.rpartition(".")[2])):
        return False
    return len(shape) > 1 or (more and dtype in ("I8", "U8", "I16", "U16", "U32"))


def _is_weight_name(name: str) -> bool:
    last = words(name.rpartition(".")[2])
    return bool(last) and last[-1] in _WEIGHTS - {"data", "codes", "blocks"}


class _Beside:
    """Tensors that may be scales: of the same module as a tensor, under its own name, or its name under a prefix."""

    def __init__(self, tensors: Described) -> None:
        self._tensors = tensors
        self._inside: dict[str, list[str]] = {}
        self._scales: dict[str, str] = {}  # name without the prefix that says "scale" -> whole name
        for name, (dtype, _) in tensors.items():
            parent, _, last = name.rpartition(".")
            # Scales of 8-bit floats, and bare exponents, are known by their names alone.
            if (is_float(dtype) and not is_float8(dtype)) or not _SCALES.isdisjoint(words(last)):
                self._inside.setdefault(parent, []).append(name)
            first, _, rest = name.partition(".")
            if rest and not _SCALES.isdisjoint(words(first)):
                self._scales[rest] = name

    def scale_of(self, name: str) -> str | None:
        """The first tensor that is a scale of `name`, by its name or by place and shape; None if none is."""
        parent, _, last = name.rpartition(".")
        own = set(words(last))
        if not _SCALES.isdisjoint(own):
            return None
        of_module = parent if _is_weight_name(name) else name
        if scale := self._scales.get(name) or self._scales.get(of_module):
            return scale
        beside = [*self._inside.get(name, ()), *self._inside.get(parent, ())]
        found = [other for other in beside if other != name and self._may_scale(other, name)]
        named = (other for other in found if self._is_named_after(other, name, own))
        unnamed = (other for other in found if self._has_scale_shape(other, name))
        return next(named, None) or next(unnamed, None) or self._beside_module(name, parent)

    def _beside_module(self, name: str, parent: str) -> str | None:
        """A scale named after the module of a weight: q_proj_scale beside the module q_proj."""
        outer, _, module = parent.rpartition(".")
        if not module or not _is_weight_name(name):
            return None
        beside = (other for other in self._inside.get(outer, ()) if self._may_scale(other, name))
        return next(
            (other for other in beside if _said_of(words(other.rpartition(".")[2])) == set(words(module))), None
        )

    def _may_scale(self, other: str, name: str) -> bool:
        dtype, _ = self._tensors[other]
        return dtype != self._tensors[name][0] and (is_float(dtype) or dtype == "U8")

    def _is_named_after(self, other: str, name: str, own: set[str]) -> bool:
        """Whether a name is that of a scale, and of the scale of `name`, whose last words are `own`.

        A bare "scale" is that of the weight of its module, or of integers; not of some other number beside it.
        """
        of = _said_of(words(other.rpartition(".")[2]))
        bare = not is_float8(self._tensors[name][0]) or _is_weight_name(name) or other.startswith(f"{name}.")
        return of is not None and (of == own - _OF_SCALES - _WEIGHTS or (bare and not of))

    def _has_scale_shape(self, other: str, name: str) -> bool:
        """Whether a tensor beside an 8-bit weight has a number for all of it, each row, each column or each block."""
        dtype, of = self._tensors[name]
        shape = self._tensors[other][1]
        plain = not _PLAIN.isdisjoint(words(other.rpartition(".")[2]))
        last = name.rpartition(".")[2]
        beside = last in ("weight", "kernel") or other.rpartition(".")[2].startswith(f"{last}_")
        if not is_float8(dtype) or len(of) < 2 or not beside or plain:
            return False
        if len(shape) < 2:
            return not shape or shape[0] in (1, of[0], of[-1])
        blocks = len(shape) == len(of) and all(0 < count <= size for count, size in zip(shape, of, strict=True))
        return blocks and tuple(shape) != tuple(of)


def _said_of(scale: Sequence[str]) -> set[str] | None:
    """Name of the tensor whose scale a name of these words says to be; None if it is not called a scale."""
    return None if _SCALES.isdisjoint(scale) else set(scale) - _SCALES - _OF_SCALES - _WEIGHTS


def words(name: str) -> list[str]:
    """Words of a parameter's name in lower case: _weight_scale -> weight, scale; W_q -> wq."""
    return ["wq"] if name == "W_q" else [word for word in re.split(r"[_.]+", name.lower()) if word]
