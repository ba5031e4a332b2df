"""`combine` on tensors that lie in files: read and combined block by block in C++ (pymerge._C), without PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

NAME = "native"

# By the codes of the safetensors format; the numbers are those of csrc/common/dtype.h.
DTYPES = {"F32": 0, "F64": 1, "F16": 2, "BF16": 3}


class FileTensor(NamedTuple):
    """Elements from byte `offset` of an open file on."""

    descriptor: int
    offset: int
    dtype: str


class Outcome(NamedTuple):
    """How a call ended: `failed` is the number of the file that could not be read (the base first), or -1."""

    finite: bool
    failed: int
    errno: int  # of that read; 0: the file ended
    offset: int  # where in the file
    reading: int  # nanoseconds spent in reads


def missing() -> str | None:
    """Why the C++ extension cannot be used; None if it can."""
    try:
        importlib.import_module("pymerge._C")
    except ImportError as error:
        return f"pymerge._C does not load ({error}); install again where a C++20 compiler is: pip install ."
    return None


def combine_files(
    out: int,
    dtype: str,
    numel: int,
    base: FileTensor | None,
    tensors: Sequence[FileTensor],
    weights: Sequence[float],
    divisor: float,
    *,
    block: int,
    check_inputs: bool,
) -> Outcome:
    """What `combine` gives for these tensors, bit for bit; without `tensors` the base, converted.

    Args:
        out: address of memory for `numel` elements of `dtype`.
        block: elements of each tensor that are read at once, into memory of this thread.
        check_inputs: look for NaN and infinity in the inputs too, not in the result alone.
    """
    from pymerge import _C

    files = [(tensor.descriptor, tensor.offset, DTYPES[tensor.dtype]) for tensor in tensors]
    origin = None if base is None else (base.descriptor, base.offset, DTYPES[base.dtype])
    target = (out, DTYPES[dtype], numel)
    return Outcome(*_C.combine_files(target, origin, files, weights, divisor, block, check_inputs))


def is_finite(address: int, dtype: str, numel: int) -> bool:
    """Whether none of the elements in memory is NaN or infinite."""
    from pymerge import _C

    return _C.is_finite((address, DTYPES[dtype], numel))
