"""Tensors that a file does not hold as they are wanted: a matrix out of a stack of them, a stack of matrices.

No element is copied for it: an entry says where the elements lie. The module imports neither numpy nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    import torch

# Reads a whole stored tensor into a tensor of its shape and dtype: `Reader.read_into`.
ReadWhole = Callable[[TensorEntry, "torch.Tensor"], None]


@dataclass(frozen=True, slots=True)
class PartEntry(TensorEntry):
    """A part of a stored tensor, `whole`. Its name says which one, as Python would."""

    whole: TensorEntry = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class StackedEntry(TensorEntry):
    """E matrices, each put together from parts along one of its axes. Its file and offset are those of the first part.

    `matrices` has the parts of each; `axis` is 0 for parts above each other, 1 for parts side by side.
    """

    matrices: tuple[tuple[TensorEntry, ...], ...] = field(kw_only=True)
    axis: int = field(kw_only=True, default=0)

    @property
    def contiguous(self) -> bool:
        return False

    @property
    def needs_torch(self) -> bool:
        return True

    @property
    def output_dtype(self) -> str:
        return self.matrices[0][0].output_dtype if self.matrices else self.dtype

    @property
    def decoded_from(self) -> str:
        return next((part.decoded_from for part in self.parts(0, len(self.matrices)) if part.decoded_from), "")

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts(0, len(self.matrices)))

    @property
    def decoding_bytes(self) -> int:
        return max((part.decoding_bytes for part in self.parts(0, len(self.matrices))), default=0)

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The entry of matrices `start` to `stop` (exclusive)."""
        matrices = self.matrices[start:stop]
        nbytes = sum(part.nbytes for parts in matrices for part in parts)
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, nbytes=nbytes, first_row=self.first_row + start, matrices=matrices)

    def parts(self, start: int, stop: int) -> Iterator[TensorEntry]:
        """The parts of matrices `start` to `stop` (exclusive)."""
        return (part for parts in self.matrices[start:stop] for part in parts)


def can_be_cut(entry: TensorEntry) -> bool:
    """Whether parts of a tensor can be told by their place: it lies in its file as it is, row by row, or in memory."""
    return type(entry) in (TensorEntry, PartEntry, HeldEntry) and entry.strides is None


def matrix_of(stack: TensorEntry, number: int) -> TensorEntry:
    """One matrix of a stored stack, E x rows x columns."""
    _, rows, columns = stack.shape
    if isinstance(stack, HeldEntry):
        return _matrix_in_memory(stack, number)
    nbytes = rows * columns * ITEM_SIZES[stack.dtype]
    name, offset = f"{stack.name}[{number}]", stack.offset + number * nbytes
    return PartEntry(name, stack.dtype, (rows, columns), stack.file, offset, nbytes, whole=stored(stack)[0])


def _matrix_in_memory(stack: HeldEntry, number: int) -> HeldEntry:
    part = stack.rows(number, number + 1)
    return replace(part, name=f"{stack.name}[{number}]", shape=stack.shape[1:], first_row=0, tensor=part.tensor[0])


def rows_of_matrix(matrix: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Some rows of a matrix that can be cut."""
    cut = matrix.rows(start, stop)
    return replace(cut, name=f"{matrix.name}[{start}:{stop}]", first_row=0)


def transposed(matrix: TensorEntry) -> TensorEntry:
    """A stored matrix, or each of a stored stack, with its last two axes exchanged."""
    *outer, rows, columns = matrix.shape
    if isinstance(matrix, HeldEntry):
        shape = (*outer, columns, rows)
        return replace(matrix, name=f"{matrix.name}.mT", shape=shape, tensor=matrix.tensor.mT)
    steps = [rows * columns] * len(outer)
    strides = matrix.strides or (*steps, columns, 1)
    turned = (*strides[:-2], strides[-1], strides[-2])
    plain = turned == (*steps, rows, 1)
    shape = (*outer, columns, rows)
    place = (matrix.file, matrix.offset, matrix.nbytes)
    whole = stored(matrix)[0]
    return PartEntry(f"{matrix.name}.mT", matrix.dtype, shape, *place, None if plain else turned, whole=whole)


def stacked(name: str, matrices: Sequence[Sequence[TensorEntry]], axis: int = 0) -> StackedEntry:
    """A stack of matrices of one dtype, each from parts that agree in their other axis; `name` is for people."""
    first = matrices[0][0]
    joined = sum(part.shape[axis] for part in matrices[0])
    matrix = (joined, first.shape[1]) if axis == 0 else (first.shape[0], joined)
    nbytes = sum(part.nbytes for parts in matrices for part in parts)
    place = (first.file, first.offset, nbytes)
    kept = tuple(map(tuple, matrices))
    return StackedEntry(name, first.dtype, (len(kept), *matrix), *place, matrices=kept, axis=axis)


def fill_stacked(read: ReadWhole, entry: StackedEntry, out: torch.Tensor, start: int, stop: int) -> None:
    """Fill `out` with matrices `start` to `stop` of a stack, reading their parts one after the other."""
    for parts, matrix in zip(entry.matrices[start:stop], out, strict=True):
        at = 0
        for part in parts:
            place = matrix.narrow(entry.axis, at, part.shape[entry.axis])
            at += part.shape[entry.axis]
            fill_place(read, part, place)


def fill_place(read: ReadWhole, part: TensorEntry, place: torch.Tensor) -> None:
    """Fill a place inside of a larger tensor with a part of it."""
    import torch

    if place.is_contiguous():
        read(part, place)
    else:
        block = torch.empty(part.shape, dtype=place.dtype)
        read(part, block)
        place.copy_(block)


def stored(entry: TensorEntry) -> list[TensorEntry]:
    """The tensors of files that an entry is made of, as their headers have them."""
    if isinstance(entry, PartEntry):
        return [entry.whole]
    if isinstance(entry, StackedEntry):
        return list(
            {id(found): found for part in entry.parts(0, len(entry.matrices)) for found in stored(part)}.values()
        )
    return [entry]
