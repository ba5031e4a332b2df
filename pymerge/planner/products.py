"""Products of factors that make an adapter's tensor of its base, where native code can add them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import NATIVE

if TYPE_CHECKING:
    from pymerge.adapters.low_rank import LowRank


def plain_product(entry: TensorEntry, *, in_memory: bool = False) -> LowRank | None:
    """Product that an adapter's tensor is made of, where that is a base, read without PyTorch, plus one.

    With `in_memory` the base may also be a tensor that somebody holds.
    """
    from pymerge.adapters.low_rank import low_rank_of

    found = low_rank_of(entry)
    if found is None or not found.plain:
        return None
    return found if all(_is_plain(part, in_memory) for part in found.parts) else None


def _is_plain(part: TensorEntry, in_memory: bool) -> bool:
    return part.dtype in NATIVE and (not part.needs_torch or (in_memory and isinstance(part, HeldEntry)))
