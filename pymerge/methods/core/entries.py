"""Merging matrices of a common basis entry by entry: the largest kept, signs elected, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymerge.methods.core.factors import total_of
from pymerge.methods.core.tall import Matrix
from pymerge.ops._philox import uniform_words

# Philox's numbers are of 32 bits.
_ONE = 2.0**32


def largest(M: Matrix, count: int) -> Matrix:
    """M with its `count` largest magnitudes, of equal ones the first, and 0 elsewhere."""
    if count >= M.size:
        return M
    if count <= 0:
        return np.zeros_like(M)
    sizes = np.abs(M).reshape(-1)
    least = _smallest(sizes, len(sizes) - count + 1)
    kept, equal = sizes > least, sizes == least
    rest = count - int(kept.sum())
    if rest < int(equal.sum()):
        equal &= equal.cumsum() <= rest
    found: Matrix = M * (kept | equal).reshape(M.shape)
    return found


def from_smallest(M: Matrix, number: int) -> Matrix:
    """M from its `number`-th smallest magnitude on (counted from 1), all that are equal to it included."""
    sizes = np.abs(M)
    return M * (sizes >= _smallest(sizes.reshape(-1), max(1, number))) if M.size else M


def _smallest(sizes: Matrix, number: int) -> float:
    """The `number`-th smallest of some sizes, counted from 1."""
    return float(np.partition(sizes, number - 1)[number - 1])  # selection in linear time


def from_key(M: Matrix, key: int, end: int) -> Matrix:
    """M where magnitudes have bits above `key`, or equal to it before the entry of number `end`; 0 elsewhere."""
    keys = np.abs(np.ascontiguousarray(M)).reshape(-1).view(np.int64)
    kept, equal = keys > key, keys == key
    equal[end:] = False
    found: Matrix = M * (kept | equal).reshape(M.shape)
    return found


def majority(parts: Sequence[Matrix]) -> float:
    """Number of entries whose sum is positive, less that of those whose sum is negative."""
    return float(np.sign(total_of(parts)).sum())


def elected_mean(parts: Sequence[Matrix], most: float | None = None) -> Matrix:
    """The mean, at each entry, of those that have the sign of the sum; where the sum is 0, the sign of most entries, or
    of `most`."""
    vote = np.sign(total_of(parts))
    vote = np.where(vote == 0, np.sign(vote.sum() if most is None else most), vote)
    total, counts = np.zeros_like(vote), np.zeros_like(vote)
    for part in parts:
        agrees = part * vote > 0
        total += part * agrees
        counts += agrees
    mean: Matrix = total / np.maximum(counts, 1.0)
    return mean


def drawn(M: Matrix, density: float, key: int) -> Matrix:
    """M with each entry kept with probability `density` and divided by it, by Philox from a key of its own."""
    if density in (0.0, 1.0):
        return M * density
    words = uniform_words(key, 0, M.size).reshape(M.shape)
    return np.where(words < int(density * _ONE), M / density, 0.0)
