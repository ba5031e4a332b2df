"""Decoding of GGUF tensors by the gguf package, row by row, in the order and with the values of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pymerge.checkpoint.decoded import Decoder, ReadRows, Span
from pymerge.checkpoint.safetensors_file import TensorEntry

# Encodings that are numbers as they are.
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Bytes that dequantising takes for each element: its result, the parts that this is put together from, and what a group
# of rows is computed in.
_WORK_BYTES = 24


@dataclass(frozen=True)
class GGUFDecoder(Decoder):
    """A vector or a matrix of GGUF as transformers has it.

    `codes` has a row for each row of the stored matrix, for each block of a vector. With `heads`, rows i and i + half
    of a head are stored as neighbours; `shift` is added to each value; a `transposed` matrix is stored as columns x
    rows.
    """

    codes: TensorEntry
    type: int  # ggml's number of the encoding
    size: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0
    transposed: bool = False

    @property
    def kind(self) -> str:
        return "" if self.type in PLAIN else f"GGUF {GGMLQuantizationType(self.type).name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.codes,)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        if self.transposed:
            yield Span(self.codes, 0, self.codes.shape[0])
        elif self.heads:
            for _, first, count in self._runs(start, stop):
                yield Span(self.codes, first, first + 2 * count - 1)
        else:
            yield self._blocks(start, stop)

    def decode(self, read: ReadRows, out: NDArray[np.float32], start: int, stop: int) -> None:
        if self.transposed:
            # The rows that are wanted are columns: of each stored row, the blocks that they lie in.
            block, nbytes = self._block
            stored = self._rows(read, *next(self.spans(start, stop))).reshape(self.size[1], -1, nbytes)
            first = start // block
            values = self._values(stored[:, first : -(-stop // block)].reshape(self.size[1], -1))
            out[:] = values[:, start - first * block : stop - first * block].T
        elif self.heads:
            for at, first, count in self._runs(start, stop):
                stored = self._rows(read, self.codes, first, first + 2 * count - 1)[::2]
                out[at : at + count] = self._values(stored).reshape(count, *self.size[1:])
        elif len(self.size) == 1:
            span = self._blocks(start, stop)
            first = start - span.start * self._block[0]
            out[:] = self._values(self._rows(read, *span)).reshape(-1)[first : first + stop - start]
        else:
            out[:] = self._values(self._rows(read, self.codes, start, stop)).reshape(out.shape)
        if self.shift:
            out += np.float32(self.shift)

    def scratch(self, elements: int) -> int:
        block, nbytes = self._block
        if self.transposed:
            return 2 * self.codes.nbytes + _WORK_BYTES * (elements + 2 * block * self.size[1])
        codes = (elements // block + 2) * nbytes
        return (3 if self.heads else 1) * codes + _WORK_BYTES * elements

    @property
    def _block(self) -> tuple[int, int]:
        """Elements and bytes of a block."""
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        return int(block), int(nbytes)

    def _blocks(self, start: int, stop: int) -> Span:
        """Rows of the codes that hold these rows: blocks of a vector."""
        block = self._block[0] if len(self.size) == 1 else 1
        return Span(self.codes, start // block, -(-stop // block))

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(row of the output, first stored row, count) of rows that are stored two apart: those of half a head."""
        size = self.size[0] // self.heads
        row = start
        while row < stop:
            head, rest = divmod(row, size)
            half, first = divmod(rest, size // 2)
            count = min(size // 2 - first, stop - row)
            yield row - start, head * size + 2 * first + half, count
            row += count

    def _rows(self, read: ReadRows, codes: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.frombuffer(read(codes, start, stop), np.uint8)
        return data.reshape(stop - start, math.prod(codes.shape[1:]))

    def _values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):  # scales that are not finite are found where it is asked for
            values: NDArray[Any] = dequantize(np.ascontiguousarray(codes), GGMLQuantizationType(self.type))
        return values
