"""Entries of tensors whose shapes alone are known: of quantised weights, and of what is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import DecodedEntry, Decoder, ReadRows, Span
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def unreadable(owner: str, name: str, shape: tuple[int, ...], why: str) -> TensorEntry:
    """The entry of a tensor, and what CheckpointError says of it when it is read, with the remedy."""
    size = shape or (1,)
    decoder = _Unreadable(f"{owner}: tensor {name!r} {why}", size)
    nbytes = math.prod(size) * ITEM_SIZES["F32"]
    return DecodedEntry(name, "F32", size, Path(owner), -1, nbytes, decoder=decoder, written="F32")


@dataclass(frozen=True)
class _Unreadable(Decoder):
    """Values that nobody can have; no two of them have the same words."""

    why: str
    size: tuple[int, ...]

    @property
    def kind(self) -> str:
        return "unreadable"

    @property
    def quantised(self) -> str:
        return ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return ()

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        return iter(())

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        raise CheckpointError(self.why)

    def scratch(self, elements: int) -> int:
        return 0
