"""Counts of bytes and operations as people write and read them."""

from __future__ import annotations

import math
import re

from pymerge.errors import ArgumentError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = _UNITS[_letter] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """Bytes of "8GiB", "500MB", "5G" or a plain number; ArgumentError if it is none of these."""
    if isinstance(text, int):
        if text > 0:
            return text
        raise ArgumentError(f"size {text} is not above 0; give a number of bytes such as 8GiB")
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS or (count := int(float(match.group(1)) * _UNITS[unit])) <= 0:
        raise ArgumentError(f"size {text!r:.60} is not understood; write for example 8GiB or 500MB")
    return count


def format_bytes(count: int, *, round_up: bool = False) -> str:
    """`count` with a binary unit and three digits, such as 1.25GiB; with `round_up` never less than `count`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{count}B"
    return f"{math.ceil(value * 100) / 100:.2f}{unit}" if round_up else f"{value:.2f}{unit}"


def count_of(number: int, thing: str) -> str:
    """A number of things with a regular plural: "1 file", "2,000 files"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def format_flops(count: int) -> str:
    """`count` floating-point operations with a decimal unit, such as 1.25 TFLOP."""
    value = float(count)
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 1000 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP"
