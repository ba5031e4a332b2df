"""Merging matrices of a common basis entry by entry: the largest kept, signs elected, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pymerge.methods.core.factors import total_of
from pymerge.ops._philox import uniform_words

# Philox's numbers are of 32 bits.
_ONE = 2.0**32


def largest(M: Tensor, count: int) -> Tensor:
    """M with its `count` largest magnitudes, of equal ones the first, and 0 elsewhere."""
    if count >= M.numel():
        return M
    if count <= 0:
        return torch.zeros_like(M)
    sizes = M.abs().reshape(-1)
    least = _smallest(sizes, len(sizes) - count + 1)
    kept, equal = sizes > least, sizes == least
    rest = count - int(kept.sum())
    if rest < int(equal.sum()):
        equal &= equal.cumsum(0) <= rest
    return M * kept.logical_or_(equal).view(M.shape)


def from_smallest(M: Tensor, number: int) -> Tensor:
    """M from its `number`-th smallest magnitude on (counted from 1), all that are equal to it included."""
    sizes = M.abs()
    return M * (sizes >= _smallest(sizes.reshape(-1), max(1, number))) if M.numel() else M


def _smallest(sizes: Tensor, number: int) -> float:
    """The `number`-th smallest of some sizes, counted from 1."""
    return float(np.partition(sizes.numpy(), number - 1)[number - 1])  # selection in linear time


def elected_mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean, at each entry, of those that have the sign of the sum; where the sum is 0, the sign of most entries."""
    vote = total_of(parts).sign()
    vote = torch.where(vote == 0, vote.sum().sign(), vote)
    total, counts = torch.zeros_like(vote), torch.zeros_like(vote)
    for part in parts:
        agrees = part * vote > 0
        total += part * agrees
        counts += agrees
    return total / counts.clamp_(min=1.0)


def drawn(M: Tensor, density: float, key: int) -> Tensor:
    """M with each entry kept with probability `density` and divided by it, by Philox from a key of its own."""
    if density in (0.0, 1.0):
        return M * density
    words = uniform_words(key, 0, M.numel(), M.device).view(M.shape)
    return torch.where(words < int(density * _ONE), M / density, 0.0)
