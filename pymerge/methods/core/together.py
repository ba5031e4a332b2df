"""Entries of many matrices merged by one threshold and one majority of signs, found over all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pymerge.common.arrays import Array
from pymerge.methods.actions import Run
from pymerge.methods.core.entries import from_key, majority
from pymerge.methods.core.tall import Matrix
from pymerge.methods.rows import Rows
from pymerge.methods.selection import Magnitudes, Selection, digits, passes_to_select

# Gives the entries of each task in one matrix, the same in every pass.
Load = Callable[[], Sequence[Matrix]]


class Told(NamedTuple):
    """Knowledge of all matrices for one: of each task the threshold, as `Thresholds` has it, and the most signs."""

    keys: tuple[int, ...]
    ends: tuple[int, ...]
    most: float


def told(run: Run, matrices: Sequence[Load], tasks: int, density: float, *, equal: bool) -> list[Told]:
    """Find what is told to each matrix, by passes over all.

    Args:
        density: share of all entries that is kept of each task, the largest; of equal ones the first.
        equal: keep from the one after these on, and all that equal it.
    """
    sizes = [load()[0].size for load in matrices]
    firsts, numel = list(accumulate(sizes, initial=0))[:-1], sum(sizes)
    count = int(density * numel)
    counts = [min(count + 1, numel) if equal else count] * tasks
    selection = Selection(numel, counts, keys_only=equal, double=True, of_model=True)
    needed = len(digits(True)) + 1 if equal else passes_to_select(numel, counts, double=True, of_model=True)
    there = [(load, first) for load, first, size in zip(matrices, firsts, sizes, strict=True) if size]
    for _ in range(needed):
        for load, first in there:
            selection.add(first, selection.count(run, _piece(load(), first)))
        selection.end_pass()
    found, most = [], 0.0
    for load, first, size in zip(matrices, firsts, sizes, strict=True):
        keys, ends = [0] * tasks, [0] * tasks
        if size:
            parts = load()
            thresholds = selection.of_piece(run, _piece(parts, first))
            keys, ends = thresholds.keys.tolist(), thresholds.ends.tolist()
            most += majority([from_key(*each) for each in zip(parts, keys, ends, strict=True)])
        found.append((tuple(keys), tuple(ends)))
    return [Told(keys, ends, most) for keys, ends in found]


def _piece(parts: Sequence[Matrix], first: int) -> Magnitudes:
    arrays = [Array.of(np.ascontiguousarray(part)) for part in parts]
    return Magnitudes(None, arrays, Rows(arrays[0], arrays, "F64", first))
