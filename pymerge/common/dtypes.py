"""Element types: one table of their safetensors codes, sizes, and names in torch, numpy, configs and C++."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.errors import ArgumentError

if TYPE_CHECKING:
    import torch


class _Row(NamedTuple):
    """One element type. `native` is its number in csrc/common/dtype.h; None where the C++ does not know it."""

    size: int  # bytes of an element
    torch: str  # name in torch, of a float also in configs
    native: int | None = None


DTYPES: dict[str, _Row] = {
    "F64": _Row(8, "float64", 1),
    "F32": _Row(4, "float32", 0),
    "F16": _Row(2, "float16", 2),
    "BF16": _Row(2, "bfloat16", 3),
    "F8_E4M3": _Row(1, "float8_e4m3fn"),
    "F8_E5M2": _Row(1, "float8_e5m2"),
    "F8_E4M3FNUZ": _Row(1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": _Row(1, "float8_e5m2fnuz"),
    "F8_E8M0": _Row(1, "float8_e8m0fnu"),
    "I64": _Row(8, "int64"),
    "I32": _Row(4, "int32"),
    "I16": _Row(2, "int16"),
    "I8": _Row(1, "int8"),
    "U64": _Row(8, "uint64"),
    "U32": _Row(4, "uint32"),
    "U16": _Row(2, "uint16"),
    "U8": _Row(1, "uint8"),
    "BOOL": _Row(1, "bool"),
}
ITEM_SIZES: dict[str, int] = {code: row.size for code, row in DTYPES.items()}
# Numbers of the types that the compiled code computes in.
NATIVE: dict[str, int] = {code: row.native for code, row in DTYPES.items() if row.native is not None}
# Names of the types that merged tensors may have: those that NATIVE knows.
MERGED: tuple[str, ...] = tuple(DTYPES[code].torch for code in NATIVE)
# Codes by the names of torch and of configs.
CODES: dict[str, str] = {row.torch: code for code, row in DTYPES.items()}


@cache
def is_float(code: str) -> bool:
    """Whether a code is a floating-point type, 8-bit floats included."""
    return code in DTYPES and code.startswith(("F", "BF"))


def is_float8(code: str) -> bool:
    """Whether a code is an 8-bit float: read and upcast, never computed in or written.

    E8M0 is none: it has powers of two alone, for scales of other tensors.
    """
    return is_float(code) and ITEM_SIZES[code] == 1 and code != "F8_E8M0"


def memory_item_size(code: str) -> int:
    """Bytes that an element takes while it is read: an 8-bit float is there twice, as stored and upcast."""
    return ITEM_SIZES[code] + (ITEM_SIZES["BF16"] if is_float8(code) else 0)


def native_dtype(code: str) -> str:
    """The code of the values that native code gets of a stored tensor: 8-bit floats as float32, others as they are."""
    return "F32" if is_float8(code) else code


def native_item_size(code: str) -> int:
    """Bytes that an element takes while native code reads it: an 8-bit float is there twice, as stored and decoded."""
    return ITEM_SIZES[code] + (ITEM_SIZES["F32"] if is_float8(code) else 0)


@cache
def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a code. Imports PyTorch."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[code].torch)
    return dtype


@cache
def code_of(dtype: torch.dtype | str) -> str:
    """The code of a torch dtype; a code is its own. Raises ArgumentError when safetensors has none for it."""
    name = str(dtype).removeprefix("torch.")
    if name in DTYPES:
        return name
    if name not in CODES:
        raise ArgumentError(f"{dtype} cannot be stored in safetensors; use one of {', '.join(CODES)}")
    return CODES[name]


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bfloat16, which holds each of their values exactly; any other tensor as it is."""
    small = tensor.dtype.is_floating_point and tensor.element_size() == 1
    return tensor.to(torch_dtype("BF16")) if small else tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared, without a copy."""
    # Not by way of torch and numpy: each call of torch lets go of the interpreter lock, and waits for other threads.
    array: Any = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # which lives as long as the view
    return memoryview(array).cast("B")
