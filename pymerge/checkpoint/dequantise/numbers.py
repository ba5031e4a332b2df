"""Numbers that stored bytes stand for, in numpy: one by one, and by tables many at once.

Imported when codes are read, not before: plans of plain models need no numpy.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Significand bits and exponent bias of 8-bit floats, and whether they have infinities, or one NaN and no -0.
_FLOAT8 = {
    "F8_E4M3": (3, 7, False, False),
    "F8_E5M2": (2, 15, True, False),
    "F8_E4M3FNUZ": (3, 8, False, True),
    "F8_E5M2FNUZ": (2, 16, False, True),
}
_WHOLE = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16"}
# Codes of E2M1, the 4-bit float of OCP's microscaling formats: MXFP4, NVFP4.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Pairs of bytes that are looked up at once: numpy makes an 8-byte index of each.
_LOOKED_UP = 2**15
INDEX_BYTES = 8 * _LOOKED_UP


def numbers(data: bytes | bytearray, dtype: str) -> Floats:
    """All elements of a stored tensor as float32, rounded once where it is wider."""
    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F64":
        return np.frombuffer(data, np.float64).astype(np.float32)
    if dtype in _FLOAT8:
        return byte_values(dtype)[np.frombuffer(data, np.uint8)]
    return np.frombuffer(data, _WHOLE[dtype]).astype(np.float32)


def powers_of_two(data: bytes | bytearray) -> Floats:
    """Numbers of E8M0: byte b is 2^(b - 127), and 255 is NaN."""
    return _powers()[np.frombuffer(data, np.uint8)]


@cache
def _powers() -> Floats:
    found = np.ldexp(np.ones(256), np.arange(256) - 127)
    found[255] = np.nan
    return found.astype(np.float32)


@cache
def byte_values(dtype: str) -> Floats:
    """The 256 numbers of a type of one byte: an 8-bit float or integer."""
    codes = np.arange(256)
    if dtype == "I8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    bits, bias, has_infinity, one_nan = _FLOAT8[dtype]
    exponent, fraction = (codes & 0x7F) >> bits, codes & (2**bits - 1)
    significand = np.where(exponent > 0, fraction + 2**bits, fraction)
    values = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - bits)
    values = np.where(codes & 0x80, -values, values)
    if one_nan:
        values[0x80] = np.nan
    elif has_infinity:
        top = exponent == exponent.max()
        values[top] = np.where(fraction[top] == 0, np.where(codes[top] & 0x80, -np.inf, np.inf), np.nan)
    else:
        values[(codes & 0x7F) == 0x7F] = np.nan
    found: Floats = values.astype(np.float32)
    return found


@lru_cache(maxsize=8)
def byte_table(dtype: str) -> NDArray[Any]:
    """Table for `look_up`: one number for each byte. An item has the numbers of two bytes."""
    return _pairs(byte_values(dtype)[:, None])


@lru_cache(maxsize=8)
def nibble_table(values: tuple[float, ...], *, low_first: bool) -> NDArray[Any]:
    """Table for `look_up`: two of 16 numbers for each byte, of its low half and its high half, or the reverse."""
    sixteen, codes = np.array(values, np.float32), np.arange(256)
    halves = [sixteen[codes & 15], sixteen[codes >> 4]]
    return _pairs(np.stack(halves if low_first else halves[::-1], axis=1))


def _pairs(of_byte: Floats) -> NDArray[Any]:
    """Items of two bytes, the first one the lower, from the numbers of each byte, one or two."""
    count = of_byte.shape[1]
    both = np.empty((256, 256, 2, count), np.float32)
    both[:, :, 0], both[:, :, 1] = of_byte[None, :], of_byte[:, None]
    # A type of 8 or 16 bytes, which is copied as it is.
    return both.reshape(-1).view(np.complex64 if count == 1 else np.complex128)


def look_up(table: NDArray[Any], data: bytes | bytearray | NDArray[np.uint8], out: Floats) -> None:
    """Fill `out`, flat and contiguous, with the numbers of all bytes."""
    codes = np.frombuffer(data, np.uint8)
    count, each = len(codes) // 2, table.itemsize // 4
    index = codes[: 2 * count].view("<u2")
    items = out[: each * count].view(table.dtype)
    for start in range(0, count, _LOOKED_UP):
        stop = min(start + _LOOKED_UP, count)
        np.take(table, index[start:stop], out=items[start:stop], mode="clip")
    if len(codes) % 2:
        out[each * count :] = table[codes[-1:]].view(np.float32)[: each // 2]
