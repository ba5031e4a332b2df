"""Reductions: map and reduce over the pieces of a tensor, pass after pass, and then its merge, piece by piece."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pymerge.common.arrays import ArrayLike
from pymerge.methods.actions import Reduce, Run
from pymerge.methods.rows import Rows

# Elements of a piece: reading one is one long request, as for elementwise actions.
RANGE_ELEMENTS = 3 * 2**19
# Pieces start at multiples of so many elements: masks are whole words there, and random numbers whole counters.
_ALIGNMENT = 64


class Reduction(ABC):
    """State of the merge of one tensor: `passes` passes in which every piece is mapped and added, then one that merges.

    `map` and `merge` change nothing: any thread may call them, for several pieces at once. `add` and `end_pass` are
    called by one thread, `add` in the order of the pieces, and `end_pass` when all of a pass have been added. No piece
    is mapped before the pass before has ended.
    """

    passes: int = 1

    @abstractmethod
    def map(self, run: Run, rows: Rows) -> Any:
        """Contribution of a piece to this pass."""

    @abstractmethod
    def add(self, first: int, mapped: Any) -> None:
        """Take in the contribution of the piece whose first element has this number."""

    @abstractmethod
    def end_pass(self) -> None:
        """Conclude a pass."""

    @abstractmethod
    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        """The merged rows."""

    @abstractmethod
    def finite(self, mapped: Any) -> bool:
        """Whether a contribution to the first pass shows that base and experts are finite in that piece."""

    def add_whole(self, run: Run, whole: Rows, pieces: Sequence[Rows]) -> None:
        """Run all passes over a tensor that is in memory, `pieces` its rows; to the same state."""
        for _ in range(self.passes):
            for rows in pieces:
                self.add(rows.first, self.map(run, rows))
            self.end_pass()


def merge_whole(action: Reduce, run: Run, whole: Rows) -> ArrayLike:
    """Merge a tensor that is in memory; the same bytes as piece by piece."""
    reduction = action.start(whole.shape, len(whole.experts))
    several = ranges(whole.shape)
    reduction.add_whole(run, whole, [whole.cut(*rows) for rows in several] if len(several) > 1 else [whole])
    return reduction.merge(run, whole)


def ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last (exclusive) rows of the pieces of a tensor of this shape; a vector is one piece."""
    if len(shape) < 2 or 0 in shape:
        return [(0, shape[0] if shape else 1)]
    row = math.prod(shape[1:])
    unit = _ALIGNMENT // math.gcd(row, _ALIGNMENT)
    height = max(1, RANGE_ELEMENTS // (row * unit)) * unit
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]
