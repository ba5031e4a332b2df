"""Tensors of files held against each other, a part at a time, without PyTorch where their bytes decide."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import DTYPES, ITEM_SIZES, is_float8

_COMPARED_BYTES = 16 << 20


class Relation(Enum):
    """Relation of the values of one tensor to those of another."""

    SAME = "same"
    CROPPED = "cropped"  # of another length along some axes, and the same where both have values
    OTHER = "other"


def relation(reader: Reader, one: TensorEntry, two: TensorEntry) -> Relation:
    """Hold two tensors against each other by their numbers, whatever their dtypes; reads what both have.

    8-bit floats are not compared with other dtypes: they count as others.
    """
    if one.same_bytes(two):
        return Relation.SAME
    if (one.dtype, one.shape) == (two.dtype, two.shape):
        return Relation.SAME if same_bytes(reader, one, two) else Relation.OTHER
    comparable = not is_float8(one.dtype) and not is_float8(two.dtype)
    if not comparable or len(one.shape) != len(two.shape) or not one.numel or not two.numel:
        return Relation.OTHER
    if not _same_numbers(reader, one, two):
        return Relation.OTHER
    return Relation.SAME if one.shape == two.shape else Relation.CROPPED


def same_bytes(reader: Reader, one: TensorEntry, two: TensorEntry) -> bool:
    """Whether two tensors of one dtype and shape are equal byte for byte."""
    if not one.shape or not one.nbytes:
        return not one.nbytes or reader.read_bytes(one) == reader.read_bytes(two)
    row = one.nbytes // one.shape[0]
    step = max(1, _COMPARED_BYTES // max(row, ITEM_SIZES[one.dtype]))
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        if reader.read_bytes(one, start, stop) != reader.read_bytes(two, start, stop):
            return False
    return True


def _same_numbers(reader: Reader, one: TensorEntry, two: TensorEntry) -> bool:
    """Whether the numbers of two tensors are equal where both have some: from index 0 on, along every axis."""
    import numpy as np

    shape = tuple(map(min, one.shape, two.shape))
    rows = shape[0] if shape else 1
    row = max(math.prod(entry.shape[1:]) * ITEM_SIZES[entry.dtype] for entry in (one, two))
    step = max(1, _COMPARED_BYTES // max(row, 1))
    inner = (slice(None), *(slice(size) for size in shape[1:]))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        parts = [_numbers(reader, entry, start, stop)[inner] for entry in (one, two)]
        if not np.array_equal(*parts):
            return False
    return True


def _numbers(reader: Reader, entry: TensorEntry, start: int, stop: int) -> Any:
    """Rows of a tensor as a numpy array with at least one axis; bfloat16 as float32."""
    import numpy as np

    raw = reader.read_bytes(entry, start, stop)
    shape = (stop - start, *entry.shape[1:])
    if entry.dtype == "BF16":
        wide = np.frombuffer(raw, "uint16").astype("uint32") << 16
        return wide.view("float32").reshape(shape)
    return np.frombuffer(raw, DTYPES[entry.dtype].torch).reshape(shape)
