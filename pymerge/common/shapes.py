"""Shapes that ops and methods agree on before there is a tensor: vectors, masks, ranks and keys by numbers alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

# What is one vector: the whole tensor, each row along the last axis, each column along the first.
Axis = Literal["whole", "rows", "columns"]
AXES = ("whole", "rows", "columns")
# Elements that references work on at once: their scratch does not grow with the tensor. A multiple of 64.
BLOCK = 2**18
# The same on a device, where a block of the size above takes less time than the launches that it is made of.
DEVICE_BLOCK = 2**22
# A key (the bits of a magnitude, as an integer) that no magnitude reaches.
NOTHING = 2**63 - 1


def vector_shape(shape: Sequence[int], axis: Axis) -> tuple[int, int]:
    """(rows, columns) of the matrix whose rows (for "columns": whose columns) are the vectors of a tensor."""
    if axis == "whole" or not shape:
        return 1, math.prod(shape)
    if axis == "rows":
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def row_bytes(numel: int) -> int:
    """Bytes of one task's mask, a bit an element: whole 64-bit words."""
    return -(-numel // 64) * 8


def exact(numel: int, count: int) -> tuple[int, int] | None:
    """Key and end of a selection of nothing or everything; None where the tensor must be looked at."""
    if count == 0:
        return NOTHING, 0
    return (0, numel) if count == numel else None


def key_of(seed: int, name: str, model: int) -> int:
    """The 64-bit key of the random numbers of one model's tensor."""
    digest = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
