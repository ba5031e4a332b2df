"""Exact selection of the k-th smallest value, without sorting and without another copy of the values."""

from __future__ import annotations

import torch
from torch import Tensor

_DIGIT = 16  # bits
BLOCK = 2**20  # up to so many values are copied, with their indices


def kth_smallest(values: Tensor, rank: int) -> float:
    """The value at `rank` (from 0) of the sorted values.

    Args:
        values: one dimension, float32 or float64, none negative (their bits are then in the values' order); NaN counts
            as larger than all.
        rank: 0 to len(values) - 1.

    Many values are counted by 16 bits at a time, the highest first, block by block.
    """
    if len(values) <= BLOCK:
        return float(values.kthvalue(rank + 1).values)
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    prefix = 0
    for shift in range(8 * values.element_size() - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device=values.device)
        for start in range(0, len(bits), BLOCK):
            here = bits[start : start + BLOCK]
            high = here >> shift
            if shift + _DIGIT < 8 * values.element_size():
                high = high[(high >> _DIGIT) == prefix]
            counts += torch.bincount(high & (2**_DIGIT - 1), minlength=2**_DIGIT)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT) | digit
    return float(torch.tensor(prefix, dtype=bits.dtype).view(values.dtype))
