"""Factors as they lie in files: parts of stored tensors, and how they are read as arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from pymerge.checkpoint.decoded import ReadRows
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from pymerge.adapters.products import Array

Range = tuple[int, int, int]  # start, stop, step


@dataclass(frozen=True, slots=True)
class Matrix:
    """A factor, picked out of a stored tensor, which counts as a matrix with its first axis as rows.

    `rows` and `columns` are those that are taken of what is stored. Then the result is transposed, or its rows are cut
    into so many `blocks`, which stand along the diagonal.
    """

    entry: TensorEntry
    rows: Range
    columns: Range
    transposed: bool = False
    blocks: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = len(range(*self.rows)), len(range(*self.columns)) * self.blocks
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def matrix(entry: TensorEntry, transposed: bool = False) -> Matrix:
    """All of a stored tensor as a factor."""
    return Matrix(entry, _all(entry.shape[0]), _all(math.prod(entry.shape[1:])), transposed)


@cache
def _all(count: int) -> Range:
    """So many; the same object for all factors, of which adapters together have thousands."""
    return 0, count, 1


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the window of a convolution that has one element: a matrix does the same."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


class Loader:
    """Reads parts of tensors as arrays of one type, and keeps whole ones while it lives."""

    def __init__(self, read: ReadRows, kind: type) -> None:
        self.kind = kind
        self._read = read
        self._whole: dict[TensorEntry, Array] = {}

    def fill(self, out: Array, entry: TensorEntry, start: int, stop: int) -> None:
        """Fill contiguous memory with rows of a stored tensor."""
        from pymerge.adapters.products import fill_values

        fill_values(out, self._read(entry, start, stop), entry.dtype)

    def rows(self, entry: TensorEntry, start: int, stop: int) -> Array:
        """Rows of a stored tensor as a matrix."""
        from pymerge.adapters.products import as_array

        data = self._read(entry, start, stop)
        return as_array(data, entry.dtype, self.kind).reshape(stop - start, math.prod(entry.shape[1:]))

    def flat(self, entry: TensorEntry) -> Array:
        return self._all(entry).reshape(-1)

    def values(self, factor: Matrix, *, kept: bool = False) -> Array:
        """A whole factor; what is stored is `kept` for others that are picked out of the same."""
        import numpy as np

        if kept or len(range(*factor.rows)) == factor.entry.shape[0]:
            stored = self._all(factor.entry)[slice(*factor.rows)]
        else:
            start, stop, step = factor.rows
            stored = self.rows(factor.entry, start, stop)[::step]
        return np.ascontiguousarray(self._shaped(factor, stored[:, slice(*factor.columns)]))

    def some(self, factor: Matrix, start: int, stop: int) -> Array:
        """Rows of a factor, reading no more than them where that can be."""
        import numpy as np

        known = bool(self._whole) and factor.entry in self._whole  # an entry's hash takes time
        if known or factor.blocks > 1 or factor.columns[2] != 1:
            return self.values(factor, kept=True)[start:stop]
        begin, _, step = factor.rows
        if not factor.transposed:
            stored = self.rows(factor.entry, begin + step * start, begin + step * (stop - 1) + 1)[::step]
            return np.ascontiguousarray(stored[:, slice(*factor.columns)])
        if type(factor.entry) is not TensorEntry or not factor.entry.contiguous:
            return self.values(factor, kept=True)[start:stop]
        left = factor.columns[0]
        lines = [self._line(factor.entry, row, left + start, left + stop) for row in range(*factor.rows)]
        return np.ascontiguousarray(np.stack(lines, axis=1))

    def _line(self, entry: TensorEntry, row: int, start: int, stop: int) -> Array:
        """Some columns of one row."""
        from pymerge.adapters.products import as_array

        width, size = math.prod(entry.shape[1:]), ITEM_SIZES[entry.dtype]
        line = replace(entry, shape=(width,), offset=entry.offset + row * width * size, nbytes=width * size)
        return as_array(self._read(line, start, stop), entry.dtype, self.kind)

    def _all(self, entry: TensorEntry) -> Array:
        if entry not in self._whole:
            self._whole[entry] = self.rows(entry, 0, entry.shape[0])
        return self._whole[entry]

    def _shaped(self, factor: Matrix, stored: Array) -> Array:
        from pymerge.adapters.products import block_diagonal

        shaped = block_diagonal(stored, factor.blocks) if factor.blocks > 1 else stored
        return shaped.T if factor.transposed else shaped
