"""NaN and infinity: found at full memory speed, reported with file, tensor and index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.common.dtypes import torch_dtype
from pymerge.errors import NonFiniteError


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: the extremes are finite, and NaN would be one of them."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def overflow(name: str, code: str) -> NonFiniteError:
    """The error of a result that is not finite though its inputs are, given its name and dtype code."""
    return NonFiniteError(
        f"{name}: the merged tensor has values that {torch_dtype(code)} cannot hold; "
        "choose out_dtype bfloat16 or float32, or smaller weights"
    )


def check_finite(entry: TensorEntry, start_row: int, tensor: Tensor) -> None:
    """Raise NonFiniteError, with file, tensor and index, unless the rows of `entry` from `start_row` are finite."""
    if is_finite(tensor):
        return
    wrong = ~torch.isfinite(tensor)
    first = wrong.nonzero()[0].tolist()
    if first:
        first[0] += entry.first_row + start_row
    raise NonFiniteError(
        f"{entry.file}: tensor {entry.name!r} has {int(wrong.sum())} values that are NaN or infinite, the first at "
        f"{first}; use a sound checkpoint, or set allow_nonfinite: true in the config to merge it all the same"
    )
