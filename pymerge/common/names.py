"""Names: of tensors, by their dots; the nearest known one; lists of them in messages; paths as text."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pymerge.errors import ArgumentError

_LISTED = 5
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def template(name: str) -> str:
    """The name with * for numbers: "model.layers.*.mlp.up_proj.weight"."""
    return _NUMBER.sub("*", name)


def block(name: str) -> int | None:
    """The first number in the name, which is the block's; None outside the blocks."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, None if none is alike."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def printable(path: Path) -> str:
    """A path as text that every file can hold: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shorten(text: str) -> str:
    """`text` quoted for an error message; hostile files hold names of any length."""
    return repr(text if len(text) <= 200 else text[:200] + "...")


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(shorten(name) for name in listed[:limit]) + more


def listed(names: Iterable[str]) -> str:
    """Number and first names of tensors, as in "2 tensors: a, b"."""
    names = list(names)
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    rest = len(names) - _LISTED
    return f"{count}: {', '.join(names[:_LISTED])}" + (f" and {rest} more" if rest > 0 else "")


def checked_pattern(text: str, before: str = "") -> str:
    """The text, if it is a regular expression. Raises ArgumentError, which begins with `before`."""
    try:
        re.compile(text)
    except re.error as error:
        raise ArgumentError(f"{before}{shorten(text)} is not a regular expression ({error}); correct it") from None
    return text
