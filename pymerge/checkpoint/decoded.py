"""Tensors that are stored as codes, and read as the float32 values that the codes stand for.

The module imports neither numpy nor PyTorch: readers import it for `DecodedEntry`, whether there are such tensors or
not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Elements that are decoded at once: so many that the interpreter costs little beside them, and so few that codes and
# values are still in a core's second-level cache when they are multiplied.
CHUNK_ELEMENTS = 2**18

# Reads rows of a stored tensor, from one to before another, as row-major bytes: `Reader.read_bytes`. A tensor without
# axes has one row.
ReadRows = Callable[[TensorEntry, int, int], bytearray]


class Span(NamedTuple):
    """Rows of a stored tensor, the first one and the one behind the last."""

    entry: TensorEntry
    start: int
    stop: int


class Decoder(ABC):
    """Decoding of one tensor. Frozen dataclasses: equal decoders decode the same bytes in the same way."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The format's name for people, as in "FP8"."""

    @property
    def quantised(self) -> str:
        """The quantised format that the values are made from; "" where none is."""
        return self.kind

    @property
    def dtype(self) -> str:
        """The code of the values' type: F32, or F64."""
        return "F32"

    @property
    def needs_torch(self) -> bool:
        """Whether decoding imports PyTorch."""
        return False

    @property
    def adapter_parts(self) -> tuple[TensorEntry, ...]:
        """Parts that are of an adapter, which changes a model's tensor."""
        return ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of all that is decoded; one axis at least."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorEntry, ...]:
        """All stored tensors that are read, the codes first."""

    @abstractmethod
    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Spans that are read for rows `start` to `stop` along the first axis."""

    @abstractmethod
    def decode(self, read: ReadRows, out: NDArray[np.float32], start: int, stop: int) -> None:
        """Fill `out`, contiguous and of the shape of rows `start` to `stop`; by any thread.

        It is called for about CHUNK_ELEMENTS, or for one row if that has more. Raises CheckpointError, which names
        file and tensor, for codes and scales that stand for nothing.
        """

    def fill(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        """Fill `out` with any number of rows, a few at a time; arguments as of `decode`."""
        step = chunk_rows(self.shape)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self.decode(read, out[first - start : last - start], first, last)

    @abstractmethod
    def scratch(self, elements: int) -> int:
        """Bytes beside `out`, codes and scales among them, that `decode` takes for so many elements at once."""


@dataclass(frozen=True, slots=True)
class DecodedEntry(TensorEntry):
    """A tensor of which a decoder makes the values; `dtype` is what reading gives, that of the decoder.

    `file` and `offset` are those of the codes, for messages; `nbytes` is what the values take. `written` is the dtype
    that an output gets where nobody chooses one.
    """

    decoder: Decoder = field(kw_only=True)
    written: str = field(kw_only=True)

    @property
    def contiguous(self) -> bool:
        return False

    @property
    def needs_torch(self) -> bool:
        return self.decoder.needs_torch or any(part.needs_torch for part in self.decoder.parts)

    @property
    def output_dtype(self) -> str:
        return self.written

    @property
    def decoded_from(self) -> str:
        return self.decoder.quantised

    @property
    def adapter_parts(self) -> tuple[TensorEntry, ...]:
        return self.decoder.adapter_parts

    @property
    def stored_bytes(self) -> int:
        whole = sum(part.stored_bytes for part in self.decoder.parts)
        return whole * self.shape[0] // max(1, self.decoder.shape[0])

    @property
    def decoding_bytes(self) -> int:
        return self.decoder.scratch(chunk_rows(self.shape) * math.prod(self.shape[1:]))

    def rows(self, start: int, stop: int) -> DecodedEntry:
        shape = (stop - start, *self.shape[1:])
        nbytes = ITEM_SIZES[self.dtype] * math.prod(shape)
        return replace(self, shape=shape, nbytes=nbytes, first_row=self.first_row + start)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Spans of the files that are read for rows `start` to `stop` of this entry."""
        return self.decoder.spans(self.first_row + start, self.first_row + stop)


def decoded(name: str, decoder: Decoder, written: str) -> DecodedEntry:
    """The entry of all that a decoder decodes, under this name."""
    codes, shape = decoder.parts[0], decoder.shape
    place = (codes.file, codes.offset, ITEM_SIZES[decoder.dtype] * math.prod(shape))
    return DecodedEntry(name, decoder.dtype, shape, *place, decoder=decoder, written=written)


def fill_decoded(read: ReadRows, entry: DecodedEntry, out: memoryview, start: int, stop: int) -> None:
    """Fill `out` (bytes) with the values of rows `start` to `stop`."""
    import numpy as np

    kind = np.float32 if entry.dtype == "F32" else np.float64
    values: NDArray[Any] = np.frombuffer(out, kind).reshape(stop - start, *entry.shape[1:])
    if values.size:
        entry.decoder.fill(read, values, entry.first_row + start, entry.first_row + stop)


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape that are decoded at once."""
    return min(max(1, shape[0]), max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:]))))
