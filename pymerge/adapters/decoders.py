"""Tensors of a base with a vector added, or with some rows replaced, made when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pymerge.checkpoint.decoded import Decoder, ReadRows, Span
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from pymerge.adapters.products import Array


class OfAdapter(Decoder):
    """A tensor of the base with something of an adapter."""

    base: TensorEntry

    @property
    def quantised(self) -> str:
        return self.base.decoded_from

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @cached_property
    def dtype(self) -> str:
        return "F64" if any(part.dtype == "F64" for part in self.parts) else "F32"

    @property
    def adapter_parts(self) -> tuple[TensorEntry, ...]:
        return self.parts[1:]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        yield Span(self.base, start, stop)


class _WithOne(OfAdapter):
    """A tensor of the base with another, of as many rows or fewer."""

    added: TensorEntry

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.base, self.added)

    def scratch(self, elements: int) -> int:
        sizes = sum(ITEM_SIZES[entry.dtype] + ITEM_SIZES[self.dtype] for entry in self.parts)
        return self.base.decoding_bytes + elements * sizes


@dataclass(frozen=True)
class AddedBias(_WithOne):
    """A bias of the base + `scale` x that of lora_B."""

    base: TensorEntry
    added: TensorEntry
    scale: float

    @property
    def kind(self) -> str:
        return "lora_bias"

    def decode(self, read: ReadRows, out: Array, start: int, stop: int) -> None:
        from pymerge.adapters.products import as_array

        own, added = (as_array(read(each, start, stop), each.dtype, out.dtype.type) for each in self.parts)
        out[:] = own + added * out.dtype.type(self.scale)


@dataclass(frozen=True)
class TokenRows(_WithOne):
    """A table of the base, in which row i of `added` stands for row `indices[i]`."""

    base: TensorEntry
    added: TensorEntry
    indices: tuple[int, ...]

    @property
    def kind(self) -> str:
        return f"{len(self.indices)} trained rows"

    def decode(self, read: ReadRows, out: Array, start: int, stop: int) -> None:
        from pymerge.adapters.products import as_array

        kind = out.dtype.type
        out[...] = as_array(read(self.base, start, stop), self.base.dtype, kind).reshape(out.shape)
        for row, index in enumerate(self.indices):
            if start <= index < stop:
                out[index - start] = as_array(read(self.added, row, row + 1), self.added.dtype, kind)
