"""Differences of two tensors, in float32 after upcasting: in memory, or read again block by block where they are large.

Blocks have sizes that depend on the shape alone, so that sums over them are the same for any budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite, is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import upcast
from pymerge.errors import NonFiniteError

# Elements of a block of rows: of float32, 4 MiB.
BLOCK = 2**20
# Elements that are squared at a time: so few that they stay in a core's cache in float64.
_SQUARED = 2**16
# A tall matrix of more elements (tables of tokens) is not held in memory.
HELD = 2**28

Blocks = Iterator[tuple[int, int, Tensor]]


def is_held(shape: tuple[int, int], algorithm: str) -> bool:
    """Whether a matrix is held in memory: all but large tall ones, of which a Gram matrix takes two looks."""
    return algorithm == "svd" or shape[0] * shape[1] <= HELD or shape[0] < shape[1]


class Delta:
    """W_t - W_0 as a matrix: rows along the first axis of the tensors, the others flattened.

    Args:
        shape: of the matrix.
        read: gives rows `start` to `stop` in float32.
        held: whether the matrix is kept in memory.
        at_once: whether it is read as one block, as a matrix of a stack is.
    """

    def __init__(
        self, shape: tuple[int, int], read: Callable[[int, int], Tensor], *, held: bool, at_once: bool = False
    ) -> None:
        self.shape = shape
        self.held = held
        self._at_once = at_once
        self._read = read
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """All of it, rows x columns in float32."""
        if self._whole is None:
            if self._at_once:
                self._whole = self._read(0, self.shape[0])
                return self._whole
            self._whole = torch.empty(self.shape)
            for start, stop in self._ranges(*self.shape):
                self._whole[start:stop] = self._read(start, stop)
        return self._whole

    def blocks(self) -> Blocks:
        """First row, last (exclusive) and the rows, in float32."""
        for start, stop in self._ranges(*self.shape):
            yield start, stop, self.whole()[start:stop] if self.held else self._read(start, stop)

    def column_blocks(self) -> Blocks:
        """First column, last (exclusive) and the columns; only of a matrix that is held."""
        for start, stop in self._ranges(self.shape[1], self.shape[0]):
            yield start, stop, self.whole()[:, start:stop]

    def square_sum(self) -> float:
        """||D||_F^2 in float64."""
        rows = (part for _, _, block in self.blocks() for part in few_rows(block))
        return sum(float(part.double().square_().sum()) for part in rows)

    @staticmethod
    def _ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
        each = max(1, BLOCK // max(1, columns))
        yield from ((start, min(start + each, rows)) for start in range(0, rows, each))


def few_rows(block: Tensor, columns: int | None = None) -> tuple[Tensor, ...]:
    """Rows of a block, a few at a time, for what makes them float64 and adds up elements; or of a factor of it, as many
    as of one with so many columns."""
    return torch.split(block, max(1, _SQUARED // max(1, block.shape[1] if columns is None else columns)))


def difference(
    reader: Reader,
    base: TensorEntry,
    expert: TensorEntry,
    shape: tuple[int, int],
    *,
    held: bool = True,
    number: int | None = None,
) -> Delta:
    """The difference of two tensors of one shape as a matrix; of a stack that of matrix `number`.

    Its blocks raise NonFiniteError, with file, tensor and index, where an input holds NaN or infinity.
    """

    def read(start: int, stop: int) -> Tensor:
        first, end = (number, number + 1) if number is not None else (start, stop)
        values = [
            upcast(reader.read(entry, first, end) if entry.shape else reader.read(entry)) for entry in (base, expert)
        ]
        wide = torch.float64 if torch.float64 in {each.dtype for each in values} else torch.float32
        delta = (values[1].to(wide) - values[0].to(wide)).float().reshape(stop - start, shape[1])
        if not is_finite(delta):
            _refuse((base, expert), values, first)
        return delta

    return Delta(shape, read, held=held, at_once=number is not None)


def _refuse(entries: tuple[TensorEntry, ...], values: list[Tensor], start: int) -> None:
    for entry, tensor in zip(entries, values, strict=True):
        check_finite(entry, start, tensor, "use a sound checkpoint, or leave the tensor out with --exclude")
    raise NonFiniteError(
        f"{entries[1].file}: tensor {entries[1].name!r} differs from the base's by more than float32 holds; "
        "leave it out with --exclude"
    )
