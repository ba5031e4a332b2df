"""What the dotted name of a tensor says: its block, and its role, which tensors of other blocks share."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def role(name: str) -> str:
    """The name with * for numbers: "model.layers.*.mlp.up_proj.weight"."""
    return _NUMBER.sub("*", name)


def block(name: str) -> int | None:
    """The first number in the name, which is the block's; None outside the blocks."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None
