"""Codes times scales: one scale for a tensor, for each row, or for each block of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import CHUNK_ELEMENTS, Decoder, ReadRows, Span
from pymerge.checkpoint.dequantise.stored import checked_scales
from pymerge.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pymerge.checkpoint.dequantise.numbers import Floats

PACKED = "E2M1"  # type of codes: two 4-bit floats in a byte, the first one in its low half


@dataclass(frozen=True)
class Grid:
    """Blocks of a tensor that have a scale each.

    The tensor is seen as `matrices` of `rows` x `columns`, of which its rows along the first axis have `lines` rows
    each. `shape` counts the blocks: of matrices (one for all, or each for itself), rows and columns. A block has
    `height` x `width` elements; the last ones in a row or column may be cut.
    """

    matrices: int
    rows: int
    columns: int
    lines: int
    shape: tuple[int, int, int]
    height: int
    width: int

    @property
    def label(self) -> str:
        """Words for what there is a scale for."""
        if self.shape == (1, 1, 1):
            return "one scale"
        if self.shape[2] == 1 and self.height == 1:
            return "a scale for each row"
        if self.shape[1] == 1 and self.width == 1:
            return "a scale for each column"
        return f"a scale for each block of {self.height} x {self.width}"


@dataclass(frozen=True)
class Scaled(Decoder):
    """(code - zero point) * scale, in float32.

    `size` is the shape of the values, `numbers` the type of a code: a dtype of one byte, or PACKED. `codes` has the
    rows of all matrices, `scales` and `zeros` (zero points, one for each scale) those of all grids. All scales are
    multiplied by the number `overall`, if there is one, or divided.
    """

    format: str
    size: tuple[int, ...]
    numbers: str
    codes: TensorEntry
    scales: TensorEntry
    grid: Grid
    zeros: TensorEntry | None = None
    overall: float | None = None
    divides: bool = False

    @property
    def kind(self) -> str:
        return self.format

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.scales, *([] if self.zeros is None else [self.zeros]))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        lines = self.grid.lines
        yield Span(self.codes, start * lines, stop * lines)

    def scratch(self, elements: int) -> int:
        from pymerge.checkpoint.dequantise.numbers import INDEX_BYTES

        grid = self.grid
        at_once = max(min(elements, CHUNK_ELEMENTS), grid.columns)
        blocks = (at_once // max(1, grid.columns) // grid.height + 2) * grid.shape[2]
        spread = at_once if grid.height == 1 and grid.shape[2] > 1 else grid.columns
        # Codes, their indices, scales and zero points as stored and as float32, and those of a row of blocks spread.
        return at_once + INDEX_BYTES + 24 * blocks + 4 * spread

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        grid = self.grid
        first, end = start * grid.lines, stop * grid.lines
        values = out.reshape(end - first, grid.columns)
        step = max(1, CHUNK_ELEMENTS // max(1, grid.columns))
        line = first
        while line < end:
            next_matrix = (line // grid.rows + 1) * grid.rows
            following = min(line + step, next_matrix, end)
            self._decode_lines(read, values[line - first : following - first], line)
            line = following

    def _decode_lines(self, read: ReadRows, out: NDArray[Any], line: int) -> None:
        """Fill some rows of one matrix, those from `line` on of all matrices."""
        import numpy as np

        from pymerge.checkpoint.dequantise.numbers import E2M1, byte_table, look_up, nibble_table, numbers

        packed = self.numbers == PACKED
        table = nibble_table(E2M1, low_first=True) if packed else byte_table(self.numbers)
        look_up(table, read(self.codes, line, line + len(out)), out.reshape(-1))
        first, last, skipped = self._blocks(line, len(out))
        if self.zeros is not None:
            zeros = numbers(read(self.zeros, first, last), self.zeros.dtype)
            self._spread(np.subtract, out, zeros, skipped)
        data = read(self.scales, first, last)
        # Of 8-bit floats small scales are rounded to 0.
        scales = checked_scales(self.scales, data, first * self.grid.shape[2], zero=self.overall is not None)
        if self.overall is not None:
            scales = (np.divide if self.divides else np.multiply)(scales, np.float32(self.overall))
        self._spread(np.multiply, out, scales, skipped)

    def _blocks(self, line: int, count: int) -> tuple[int, int, int]:
        """Rows of blocks that some rows of one matrix lie in, and how many rows of the first come before them."""
        grid = self.grid
        matrix, row = divmod(line, grid.rows)
        before = matrix * grid.shape[1] if grid.shape[0] > 1 else 0
        first = row // grid.height
        return before + first, before + -(-(row + count) // grid.height), row - first * grid.height

    def _spread(self, apply: Callable[..., Any], out: NDArray[Any], values: Floats, skipped: int) -> None:
        """Apply a ufunc to rows and the value of each one's block."""
        import numpy as np

        grid = self.grid
        factors: NDArray[Any] = values.reshape(-1, grid.shape[2])
        if grid.shape[2] > 1 and grid.width > 1:
            if grid.columns % grid.width == 0:
                out, factors = out.reshape(len(out), -1, grid.width), factors[:, :, None]
            else:
                factors = np.repeat(factors, grid.width, axis=1)[:, : grid.columns]
        if len(factors) in (1, len(out)):
            apply(out, factors, out=out)
            return
        for number, factor in enumerate(factors):
            start = max(0, number * grid.height - skipped)
            rows = out[start : (number + 1) * grid.height - skipped]
            apply(rows, factor, out=rows)


def grid_of(
    size: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None, *, divides: bool = False
) -> Grid | None:
    """The grid of a tensor's scales, by the shapes of both; None if they do not fit.

    Args:
        size: shape of the tensor, of two axes or more.
        scales: shape of its scales: one; one for each row; or as many axes, with one scale for each element of an axis,
            for each `block` of it or for all.
        block: height and width that config.json gives, or that are usual; the last blocks may be cut.
        divides: other blocks are equal parts of an axis.
    """
    inner = math.prod(size[1:])
    if math.prod(scales) == 1:
        return Grid(1, size[0], inner, 1, (1, 1, 1), size[0], inner)
    if len(scales) == 1:
        scales = (*scales, *[1] * (len(size) - 1))
    if len(scales) != len(size):
        return None
    if all(count == 1 for count in scales[1:]):
        height = _block(size[0], scales[0], block and block[0], divides)
        return Grid(1, size[0], inner, 1, (1, scales[0], 1), height, inner) if height else None
    if len(size) > 3 or (len(size) == 3 and scales[0] not in (1, size[0])):
        return None
    height = _block(size[-2], scales[-2], block and block[0], divides)
    width = _block(size[-1], scales[-1], block and block[1], divides)
    if not height or not width:
        return None
    matrices, lines = (size[0], size[1]) if len(size) == 3 else (1, 1)
    shape = (scales[0] if len(size) == 3 else 1, scales[-2], scales[-1])
    return Grid(matrices, size[-2], size[-1], lines, shape, height, width)


def _block(size: int, count: int, usual: int | None, divides: bool) -> int | None:
    """Elements of each of so many blocks of an axis; None if it has not so many."""
    if usual and -(-size // usual) == count:
        return usual
    if count == size:
        return 1
    if count == 1:
        return max(1, size)
    return size // count if divides and count and size % count == 0 else None


def as_rows(entry: TensorEntry, rows: int) -> TensorEntry | None:
    """The entry seen as a matrix of so many rows; None for a view that is none."""
    columns = entry.numel // max(1, rows)
    if entry.shape == (rows, columns):
        return entry
    return replace(entry, shape=(rows, columns)) if entry.strides is None else None
