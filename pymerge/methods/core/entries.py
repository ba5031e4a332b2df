"""Merging matrices of a common basis entry by entry: the largest kept, signs elected, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    least = sizes.kthvalue(len(sizes) - count + 1).values
    kept, equal = sizes > least, sizes == least
    kept |= equal & (equal.cumsum(0) <= count - int(kept.sum()))
    return M * kept.view(M.shape)


def from_smallest(M: Tensor, number: int) -> Tensor:
    """M from its `number`-th smallest magnitude on (counted from 1), all that are equal to it included."""
    sizes = M.abs().reshape(-1)
    return M * (M.abs() >= sizes.kthvalue(max(1, number)).values) if len(sizes) else M


def elected_mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean, at each entry, of those that have the sign of the sum; where the sum is 0, the sign of most entries."""
    vote = torch.stack(tuple(parts)).sum(dim=0).sign()
    vote = torch.where(vote == 0, vote.sum().sign(), vote)
    agreeing = [torch.where(part.sign() == vote, part, 0.0) for part in parts]
    counts = torch.stack([(part != 0).to(part.dtype) for part in agreeing]).sum(dim=0)
    return torch.stack(agreeing).sum(dim=0) / counts.clamp(min=1.0)


def drawn(M: Tensor, density: float, key: int) -> Tensor:
    """M with each entry kept with probability `density` and divided by it, by Philox from a key of its own."""
    if density in (0.0, 1.0):
        return M * density
    words = uniform_words(key, 0, M.numel(), M.device).view(M.shape)
    return torch.where(words < int(density * _ONE), M / density, 0.0)
