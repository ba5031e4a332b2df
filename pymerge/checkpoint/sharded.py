"""Tensors that lie in parts, as the processes of a training held them: boxes that fill the tensor side by side.

The module imports neither numpy nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from pymerge.checkpoint.composed import ReadWhole, fill_place
from pymerge.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    import torch


class Shard(NamedTuple):
    """A box of a tensor: where its first element is in the tensor, and where its own are in a file."""

    start: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class ShardedEntry(TensorEntry):
    """A tensor with at least one axis, of which each element is in exactly one shard.

    Its file and offset are those of the first shard.
    """

    shards: tuple[Shard, ...] = field(kw_only=True)

    @property
    def contiguous(self) -> bool:
        return False

    @property
    def needs_torch(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> ShardedEntry:
        """The entry of rows `start` to `stop` (exclusive)."""
        row_bytes = self.nbytes // max(1, self.shape[0])
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            nbytes=(stop - start) * row_bytes,
            first_row=self.first_row + start,
            shards=tuple(self.cut(start, stop)),
        )

    def cut(self, start: int, stop: int) -> Iterator[Shard]:
        """The parts of the shards that are rows `start` to `stop` (exclusive); the first row is 0."""
        for (first, *rest), entry in self.shards:
            low, high = max(first, start), min(first + entry.shape[0], stop)
            if low < high:
                whole = high - low == entry.shape[0]
                yield Shard((low - start, *rest), entry if whole else entry.rows(low - first, high - first))

    def parts(self, start: int, stop: int) -> Iterator[TensorEntry]:
        """Entries in files of what is rows `start` to `stop` (exclusive)."""
        return (shard.entry for shard in self.cut(start, stop))


def fill_sharded(read: ReadWhole, entry: ShardedEntry, out: torch.Tensor, start: int, stop: int) -> None:
    """Fill `out` with rows `start` to `stop` of a tensor, reading what of each shard belongs there."""
    for at, part in entry.cut(start, stop):
        place = out
        for axis, (first, size) in enumerate(zip(at, part.shape, strict=True)):
            place = place.narrow(axis, first, size)
        fill_place(read, part, place)
