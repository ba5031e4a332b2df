"""Tensors and arrays as csrc/bindings takes them: (address, dtype, elements or row stride)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import Array, ArrayLike, dtype_of
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, code_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

Matrix = tuple[int, int, int]


def contiguous(values: ArrayLike) -> ArrayLike:
    """The tensor itself if its elements follow each other, else a copy. To be held until the C++ returns."""
    return values if isinstance(values, Array) else values.contiguous()


def flat(values: ArrayLike) -> Matrix:
    """A contiguous tensor as one row: (address, dtype, elements)."""
    if isinstance(values, Array):
        return values.address, NATIVE[values.dtype], math.prod(values.shape)
    return values.data_ptr(), _number(values.dtype), values.numel()


@cache
def _number(dtype: torch.dtype) -> int:
    """The number that C++ knows a dtype by."""
    return NATIVE[code_of(dtype)]


def optional(values: ArrayLike | None) -> Matrix | None:
    """`flat` of a tensor, if there is one."""
    return None if values is None else flat(values)


def address(values: ArrayLike) -> int:
    """The address of the first element."""
    return values.address if isinstance(values, Array) else values.data_ptr()


def numpy_address(values: NDArray[Any]) -> int:
    """The address of a contiguous, writable numpy array; 0 of an empty one. Faster than values.ctypes.data."""
    return ctypes.addressof(ctypes.c_char.from_buffer(values.data)) if values.size else 0


def output(out: ArrayLike | None, like: ArrayLike, out_dtype: str | None) -> ArrayLike:
    """Memory for a result: `out`, or new memory of the shape of `like`, of its kind, in `out_dtype` or its dtype."""
    if out is not None:
        return out
    code = code_of(out_dtype or like.dtype)
    if isinstance(like, Array):
        return Array.mapped(math.prod(like.shape) * ITEM_SIZES[code]).at(0, code, like.shape)
    import torch

    # Faster than torch.empty, which takes longer than small sums.
    return torch.empty_like(like, dtype=torch_dtype(code), memory_format=torch.contiguous_format)


def rows_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous and do not overlap, else a copy."""
    import torch

    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    # Not contiguous(): it keeps meaningless strides of dimensions of size 0 or 1.
    return torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def matrix(values: Tensor) -> Matrix:
    """A matrix whose rows are contiguous: (address, dtype, row stride)."""
    return values.data_ptr(), NATIVE[dtype_of(values)], values.stride(0)


def numbers(values: Sequence[float]) -> list[float]:
    """Weights and the like as C++'s doubles."""
    return [float(value) for value in values]
