"""Places of a GGUF file's tensors: how long each is in its encoding, and whether all of them are in the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pymerge.checkpoint.gguf.header import GGUFHeader, StoredTensor
from pymerge.checkpoint.safetensors_file import AGAIN
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

ORIGINAL = "merge the original weights instead"


class Encoding(NamedTuple):
    """An encoding of ggml: `block` elements take `nbytes` bytes."""

    number: int
    name: str
    block: int
    nbytes: int


class Place(NamedTuple):
    """A stored tensor with its encoding."""

    stored: StoredTensor
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        return self.bytes_of(self.stored.shape)

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of rows of this shape."""
        return math.prod(shape) // self.encoding.block * self.encoding.nbytes


def places(path: Path, header: GGUFHeader) -> dict[str, Place]:
    """Places of all tensors. Raises CheckpointError for encodings that are not known, shapes that these do not allow,
    and tensors that lie in each other or beyond the end of the file."""
    found = {name: _place(path, tensor) for name, tensor in header.tensors.items()}
    _check_apart(path, found.values(), header.file_bytes)
    return found


@cache
def encoding(number: int) -> Encoding | str:
    """An encoding that gguf can dequantise, or why it cannot."""
    try:
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return f"is of type {number}, which this version of gguf does not know; pip install --upgrade gguf"
    try:
        dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
        return f"is of type {kind.name}, which gguf does not dequantise; {ORIGINAL}"
    return Encoding(number, kind.name, int(block), int(nbytes))


def _place(path: Path, stored: StoredTensor) -> Place:
    where = f"{path}: tensor {shorten(stored.name)}"
    kind = encoding(stored.type)
    if isinstance(kind, str):
        raise CheckpointError(f"{where}: {kind}")
    if not 1 <= len(stored.shape) <= 3 or 0 in stored.shape:
        raise CheckpointError(f"{where}: has shape {list(stored.shape)}, as no weight of these models has; {AGAIN}")
    if stored.shape[-1] % kind.block:
        raise CheckpointError(
            f"{where}: has rows of {stored.shape[-1]} elements, which are not whole blocks of {kind.block} "
            f"({kind.name}); {AGAIN}"
        )
    return Place(stored, kind)


def _check_apart(path: Path, found: Iterable[Place], file_bytes: int) -> None:
    end = 0
    for place in sorted(found, key=lambda place: place.stored.offset):
        name, start = shorten(place.stored.name), place.stored.offset
        if start < end:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {start}, inside the one before it; {AGAIN}")
        end = start + place.nbytes
        if end > file_bytes:
            raise CheckpointError(
                f"{path}: is cut short: tensor {name} ends at byte {end}, the file at {file_bytes}; {AGAIN}"
            )
