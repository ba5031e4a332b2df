"""Element types of the safetensors format by their codes; what torch calls them is in pymerge.common.torch_dtypes."""

from __future__ import annotations

ITEM_SIZES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


def is_float(code: str) -> bool:
    """Whether a dtype code is a floating-point type, 8-bit floats included."""
    return code in ITEM_SIZES and code.startswith(("F", "BF"))


def is_float8(code: str) -> bool:
    """Whether a dtype code is an 8-bit float: read and upcast, never computed in or written."""
    return is_float(code) and ITEM_SIZES[code] == 1


def memory_item_size(code: str) -> int:
    """Bytes that an element takes while it is read: an 8-bit float is there twice, as stored and upcast."""
    return ITEM_SIZES[code] + (ITEM_SIZES["BF16"] if is_float8(code) else 0)
