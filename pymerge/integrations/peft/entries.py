"""Entries of tensors in memory, and of those whose shapes alone are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import DecodedEntry, Decoder, ReadRows, Span
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Numbered:
    """Makes entries of one owner, which messages name: no two of them are the same."""

    def __init__(self, owner: Path) -> None:
        self._owner = owner
        self._next = 0

    def entry(self, name: str, tensor: Tensor) -> TensorEntry:
        """The entry of a tensor; one without axes has one."""
        values = tensor.detach().reshape(tensor.shape or (1,))
        code = code_of(values.dtype)
        return HeldEntry(
            name, code, tuple(values.shape), self._owner, self._place(values.numel()), values.nbytes, tensor=values
        )

    def unreadable(self, name: str, shape: tuple[int, ...], why: str) -> TensorEntry:
        """The entry of a tensor whose values cannot be had, and what CheckpointError says when they are read."""
        decoder = _Unreadable(f"{self._owner}: tensor {name!r} {why}", shape)
        nbytes = math.prod(shape) * ITEM_SIZES["F32"]
        place = self._owner, self._place(math.prod(shape)), nbytes
        return DecodedEntry(name, "F32", shape, *place, decoder=decoder, written="F32")

    def _place(self, elements: int) -> int:
        place = self._next
        self._next += max(1, elements)
        return place


@dataclass(frozen=True)
class _Unreadable(Decoder):
    """Values that nobody can have."""

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
