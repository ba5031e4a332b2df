"""`combine` on tensors that lie in files: read and combined block by block in C++ (pymerge._C), without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pymerge.backends.native._arguments import flat
from pymerge.common.arrays import Array
from pymerge.common.dtypes import NATIVE


class FileTensor(NamedTuple):
    """Elements from byte `offset` of an open file on."""

    descriptor: int
    offset: int
    dtype: str


class Outcome(NamedTuple):
    """End of a call: `failed` is the number of the file that could not be read (the base first), or -1."""

    finite: bool
    failed: int
    errno: int  # of that read; 0: the file ended
    offset: int  # where in the file
    reading: int  # nanoseconds spent in reads


def combine_files(
    out: Array,
    base: FileTensor | None,
    tensors: Sequence[FileTensor],
    weights: Sequence[float],
    divisor: float,
    *,
    block: int,
    check_inputs: bool,
) -> Outcome:
    """Write the result of `combine` on these tensors, bit for bit; without `tensors` the base, converted.

    Args:
        out: memory for the result, in its dtype.
        block: elements of each tensor that are read at once, into memory of this thread.
        check_inputs: look for NaN and infinity in the inputs too, not in the result alone.
    """
    from pymerge import _C

    files = [(tensor.descriptor, tensor.offset, NATIVE[tensor.dtype]) for tensor in tensors]
    origin = None if base is None else (base.descriptor, base.offset, NATIVE[base.dtype])
    return Outcome(*_C.combine_files(flat(out), origin, files, weights, divisor, block, check_inputs))


def is_finite(values: Array) -> bool:
    """Whether none of the elements is NaN or infinite."""
    from pymerge import _C

    return _C.is_finite(flat(values))
