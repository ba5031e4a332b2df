"""Tensors in memory as entries: plans, readers and decoders take them like those of files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import DecodedEntry, Decoder, ReadRows, Span
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Held(Decoder):
    """A tensor of floats on any device, read as float32, or as float64 if it is that. One without axes has one row.

    `unreadable` says why its values cannot be had: of a quantised weight, of one that is elsewhere.
    """

    tensor: Tensor
    where: str
    size: tuple[int, ...]
    unreadable: str = ""

    @property
    def kind(self) -> str:
        return "in memory"

    @property
    def quantised(self) -> str:
        return ""

    @property
    def dtype(self) -> str:
        return "F64" if not self.unreadable and code_of(self.tensor.dtype) == "F64" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return ()

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        return iter(())

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        self.fill(read, out, start, stop)

    def fill(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        import torch

        if self.unreadable:
            raise CheckpointError(f"{self.where} {self.unreadable}")
        torch.from_numpy(out).copy_(self.tensor.detach().reshape(self.size)[start:stop])

    def scratch(self, elements: int) -> int:
        return elements * ITEM_SIZES[self.dtype]  # of one that is on another device, or not contiguous


def held(
    name: str, tensor: Tensor, owner: str, *, size: tuple[int, ...] | None = None, unreadable: str = ""
) -> DecodedEntry:
    """The entry of a tensor.

    Args:
        name: of the tensor.
        tensor: read when the entry is, not before.
        owner: what messages call what it is of.
        size: its shape, where that of the stored tensor is another; for those that are `unreadable`.
        unreadable: what CheckpointError says of it when it is read, with the remedy.
    """
    shape = tuple(tensor.shape) or (1,) if size is None else size
    decoder = Held(tensor, f"{owner}: tensor {name!r}", shape, unreadable)
    nbytes = ITEM_SIZES[decoder.dtype]
    for length in shape:
        nbytes *= length
    written = "F32" if unreadable else code_of(tensor.dtype)
    return DecodedEntry(name, decoder.dtype, shape, Path(owner), 0, nbytes, decoder=decoder, written=written)
