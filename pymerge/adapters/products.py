"""Products of factors, added to rows: every element the same bits, whichever rows are asked for, on any thread.

Imported when tensors of adapters are read, not before: plans of plain models need no numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint.dequantise.numbers import numbers

Array = NDArray[Any]

# A product is made of tiles that begin at multiples of these rows and columns. OpenBLAS gives a product of at most 2^18
# multiplications to one thread, and in what order it adds up an element depends on the shape of a product alone.
TILE_ROWS = 16
_TILE_COLUMNS = 512
_TILE_DEPTH = 32


def as_array(data: bytes | bytearray, code: str, kind: type) -> Array:
    """All elements of a stored tensor, in float32 or float64."""
    if code == "F64" and kind is np.float64:
        return np.frombuffer(data, np.float64)
    return numbers(data, code).astype(kind, copy=False)


def fill_values(out: Array, data: bytes | bytearray, code: str) -> None:
    """Fill `out`, contiguous and of float32 or float64, with the elements of a stored tensor."""
    if code == "BF16" and out.dtype == np.float32:  # in place, which is what most reading is
        bits = out.reshape(-1).view(np.uint32)
        np.copyto(bits, np.frombuffer(data, np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        out.reshape(-1)[:] = as_array(data, code, out.dtype.type)


def add_product(out: Array, left: Array, right: Array, scale: float, skipped: int) -> None:
    """Add rows of `scale` x `left` @ `right` to `out`.

    Args:
        out: contiguous rows, as wide as `right`.
        left: rows of the left factor, from one at a multiple of TILE_ROWS on, to whole tiles or its end.
        right: all of the right factor.
        skipped: rows of the product before those of `out`.
    """
    room = np.empty((2, TILE_ROWS * _TILE_COLUMNS), out.dtype)
    factor, width = out.dtype.type(scale), right.shape[1]
    for top in range(0, len(left), TILE_ROWS):
        block = left[top : top + TILE_ROWS]
        first, last = max(skipped - top, 0), min(len(block), skipped + len(out) - top)
        if first >= last:
            continue
        for at in range(0, width, _TILE_COLUMNS):
            columns = right[:, at : at + _TILE_COLUMNS]
            tile = _tile(block, columns, room)
            if factor != 1:
                tile *= factor
            out[top + first - skipped : top + last - skipped, at : at + _TILE_COLUMNS] += tile[first:last]


def _tile(block: Array, columns: Array, room: Array) -> Array:
    """block @ columns, a few terms of each sum at a time."""
    shape = (block.shape[0], columns.shape[1])
    total: Array = room[0, : shape[0] * shape[1]].reshape(shape)
    part: Array = room[1, : shape[0] * shape[1]].reshape(shape)
    np.matmul(block[:, :_TILE_DEPTH], columns[:_TILE_DEPTH], out=total)
    for at in range(_TILE_DEPTH, block.shape[1], _TILE_DEPTH):
        np.matmul(block[:, at : at + _TILE_DEPTH], columns[at : at + _TILE_DEPTH], out=part)
        total += part
    return total


def block_diagonal(stacked: Array, blocks: int) -> Array:
    """Matrices that are stored above each other, along the diagonal of one."""
    rows, columns = stacked.shape[0] // blocks, stacked.shape[1]
    whole = np.zeros((blocks * rows, blocks * columns), stacked.dtype)
    for i in range(blocks):
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = stacked[i * rows : (i + 1) * rows]
    return whole


def row_norms(rows: Array) -> Array:
    """Norm of each row, summed up in the order in which PEFT's DoRA does it. Imports PyTorch."""
    import torch

    norms: Array = torch.linalg.norm(torch.from_numpy(rows), dim=1).numpy()
    return norms


def add_column_squares(squares: Array, rows: Array) -> None:
    """Add the squares of each column, row after row, which is the order of PEFT's DoRA where weights are transposed."""
    for row in rows:
        squares += row * row
