"""What torch calls the element types of the safetensors format, and tensors as bytes. Imports PyTorch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from pymerge.errors import ArgumentError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bfloat16, which holds each of their values exactly; any other tensor as it is."""
    small = tensor.dtype.is_floating_point and tensor.element_size() == 1
    return tensor.to(torch.bfloat16) if small else tensor


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype. Raises ArgumentError when the format has none for it."""
    if dtype not in _CODES:
        raise ArgumentError(f"{dtype} cannot be stored in safetensors; use one of {', '.join(TORCH_DTYPES)}")
    return _CODES[dtype]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared, without a copy."""
    # Not by way of torch and numpy: each call of torch lets go of the interpreter lock, and waits for other threads.
    array: Any = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # which lives as long as the view
    return memoryview(array).cast("B")
