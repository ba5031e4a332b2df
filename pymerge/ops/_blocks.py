"""Tensors some elements after the other: references work in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import BLOCK
from pymerge.ops._bitmask import block_of, blocks, unpack
from pymerge.ops._op import compute_dtype, numel_of, task_vector

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Scratch bytes for each element of `task_blocks`: task vectors, also stacked, masks and sums.
_BYTES_OF_TASK, _BYTES_OF_SUMS = 24, 48


def delta_blocks(
    base: ArrayLike | None, expert: ArrayLike, size: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """First element, last (exclusive) and tau of each block of one task; W_t itself where there is no base.

    Deltas in float32 (float64 if an input is). To be read only: they may be the expert's memory.
    """
    origin = None if base is None else as_tensor(base).reshape(-1)
    flat, dtype = as_tensor(expert).reshape(-1), compute_dtype(base, expert)
    for begin, end in blocks(len(flat), size or block_of(expert)):
        here = flat[begin:end]
        yield begin, end, here.to(dtype) if origin is None else task_vector(origin[begin:end], here, None, dtype)


def task_blocks(
    base: ArrayLike, experts: Sequence[ArrayLike], dtype: torch.dtype, bits: ArrayLike | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Place, W_0 and task vectors [T, n] of each block; 0 where a mask (a bit an element) is not set."""
    import torch

    origin, flat = as_tensor(base).reshape(-1), [as_tensor(expert).reshape(-1) for expert in experts]
    mask = None if bits is None else as_tensor(bits)
    for begin, end in blocks(numel_of(base), block_of(base)):
        here = slice(begin, end)
        start = origin[here].to(dtype, copy=True)
        taus = torch.stack([each[here].to(dtype) - start for each in flat])
        yield here, start, taus if mask is None else taus.mul_(unpack(mask, begin, end))


def matrix_blocks(rows: int, columns: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows and columns that cover a matrix, of at most so many elements each."""
    width = min(max(columns, 1), most)
    height = max(1, most // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


def sum_in_order(taus: Tensor) -> Tensor:
    """The sum over tasks, one after the other."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    return total


def block_bytes(shape: tuple[int, ...], experts: int) -> int:
    """Bytes of scratch of a reference that goes through `task_blocks`."""
    return min(math.prod(shape), BLOCK) * (_BYTES_OF_TASK * experts + _BYTES_OF_SUMS)
