"""Origin of each row of a gathered table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# In `RowMap.source`, where no single row is taken.
ZERO, AVERAGE, MEAN = -1, -2, -3


@dataclass(frozen=True, eq=False)
class RowMap:
    """Origin of each row of a table; the same for all token tables of a model, so sources are numbers.

    `source[i]` is the number of a table and `row[i]` a row of it. Otherwise source[i] is ZERO (zeros), AVERAGE (of the
    rows `averages[row[i]]`, pairs of a table and a row), or MEAN (of all rows of this table that are not MEAN).
    """

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    averages: tuple[tuple[tuple[int, int], ...], ...] = ()

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The rows that do not follow the one before them in the same table."""
        same = self.source[1:] == self.source[:-1]
        follows = (self.row[1:] == self.row[:-1] + 1) & (self.source[1:] != AVERAGE)
        follows |= np.isin(self.source[1:], (ZERO, MEAN))
        return np.flatnonzero(np.concatenate(([True], ~(same & follows))))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tables(self) -> set[int]:
        """Numbers of the tables that are read."""
        averaged = {table for pairs in self.averages for table, _ in pairs}
        return {int(table) for table in np.unique(self.source) if table >= 0} | averaged

    def is_identity(self, table: int) -> bool:
        """Whether row i is row i of this table, for all i."""
        return bool((self.source == table).all()) and bool((self.row == np.arange(len(self.row))).all())

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, end, source, row) of rows `start` to `stop`, cut where they do not follow each other in a table."""
        if start >= stop:
            return
        low, high = np.searchsorted(self._starts, (start, stop))
        firsts = [start, *(first for first in self._starts[low:high].tolist() if first != start)]
        sources, rows = self.source[firsts].tolist(), self.row[firsts].tolist()
        yield from zip(firsts, [*firsts[1:], stop], sources, rows, strict=True)

    def digest(self) -> str:
        """sha256 (hex) of all that it says."""
        found = hashlib.sha256(self.source.tobytes() + self.row.tobytes())
        found.update(repr(self.averages).encode())
        return found.hexdigest()
