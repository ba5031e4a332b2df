"""Numbers and flags that were written as text."""

from __future__ import annotations

import re


def as_meant(text: str, *, flag: bool) -> str | None:
    """Form in YAML of what a text seems to mean: numbers and flags without quotes, with a point; None if unknown."""
    text = text.strip()
    if flag:
        return f"{text.lower()} without quotes" if text.lower() in ("true", "false") else None
    part = re.fullmatch(r"([-+]?[\d.]+) *(%|/ *([\d.]+))", text)
    try:
        if part:
            return f"{float(part[1]) / (100.0 if part[2] == '%' else float(part[3])):.12g}"
        number = float(text.replace(",", "."))
    except (ValueError, ZeroDivisionError):
        return None
    return f"{number:.12g} without quotes" if "," not in text else f"{number:.12g}"
