"""Where the k largest elements of each task vector end, found at once or in passes over row ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.common.shapes import exact
from pymerge.methods.parts import Limits, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bits of the float32 keys that one pass decides, from the top.
_DIGIT = 16
_LAST = 15  # of float32 keys
_INFINITY = 0x7F800000  # its key; those of NaN are larger
# What is kept of each range and task behind the last pass: how many elements have each value of the last digit.
BYTES_OF_RANGE = 4 << _LAST
# Counts of one range, and of all together.
SCRATCH_BYTES = 3 * 8 << _DIGIT


def digits(key_bits: int = 31) -> list[int]:
    """Bits that each pass decides of keys (31 bits in float32, 63 in float64), from the top."""
    return [_DIGIT] * (key_bits // _DIGIT) + [key_bits % _DIGIT]


def passes_to_select(numel: int, counts: Sequence[int]) -> int:
    """How many passes over all ranges a `Selection` needs."""
    return 0 if all(exact(numel, count) is not None for count in counts) else len(digits())


class Selection:
    """`trim_threshold` of a tensor that may be seen range by range: the same elements, of equal ones the first.

    Either `find` gets the whole tensor, or each pass counts all ranges, takes the counts in their order and is settled,
    as often as `passes_to_select` says. Then `of_range` gives the thresholds of any range.
    """

    def __init__(self, numel: int, counts: Sequence[int | None], *, keys_only: bool = False, bits: int = 31) -> None:
        """None as a count: `choose` tells it before the first pass is settled, or anything is found.

        `keys_only`: nothing is selected, the key of the last element is wanted, even if that is the least of all.
        """
        known = [None if count is None or keys_only else exact(numel, count) for count in counts]
        self._numel = numel
        self._keys_only = keys_only
        self._counts = list(counts)
        self._keys = [0 if found is None else found[0] for found in known]
        self._ends = [numel if found is None else found[1] for found in known]
        self._open = [task for task, found in enumerate(known) if found is None]
        # To be taken of those that start as the key does.
        self._left = {task: counts[task] or 0 for task in self._open}
        self._digits = digits(bits)
        self._total: NDArray[Any] | None = None
        self._of_ranges: list[tuple[int, NDArray[Any]]] = []  # number of the first element, counts of the last digit
        self._ties: dict[int, dict[int, tuple[int, int]]] = {}  # by task and first element: how many are taken, of all

    def choose(self, count: int) -> None:
        """Select so many of the only task."""
        self._counts, self._left = [count], {0: count}
        known = exact(self._numel, count)
        if known is not None:
            self._keys, self._ends = [known[0]], [known[1]]
            self._open, self._total = [], None

    def find(self, whole: Part) -> None:
        """Look at the whole tensor."""
        if self._open:
            keys, ends = whole.trim_threshold([count or 0 for count in self._counts])
            self._keys, self._ends = list(keys), list(ends)

    def count(self, part: Part) -> NDArray[Any] | None:
        """The magnitudes of a range."""
        if not self._open:
            return None
        bits, *lower = self._digits
        return part.magnitude_counts(self._open, [self._keys[task] for task in self._open], sum(lower), bits)

    def finite(self, counts: NDArray[Any] | None) -> bool:
        """Whether the counts of the first digit show that no task has NaN or infinity."""
        if counts is None or len(counts) < len(self._counts):
            return False
        return not counts[:, _INFINITY >> _LAST :].any()

    def take(self, first: int, counts: NDArray[Any] | None) -> None:
        """Add what `count` gave for the next range."""
        if counts is None:
            return
        if len(self._digits) == 1 and not self._keys_only:
            self._of_ranges.append((first, counts.astype("uint32")))
        if self._total is None:
            self._total = counts
        else:
            self._total += counts

    def settle(self) -> None:
        """All ranges have been counted."""
        if self._total is None:
            return
        bits = self._digits.pop(0)
        for index, task in enumerate(self._open):
            digit, self._left[task], ties = _last_kept(self._total[index], self._left[task])
            self._keys[task] = (self._keys[task] << bits) | digit
            if not self._digits and self._left[task] < ties and not self._keys_only:
                self._share(task, index, digit)
        self._total = None
        if not self._digits:
            self._of_ranges = []

    def _share(self, task: int, index: int, digit: int) -> None:
        """Take of equal elements the first."""
        left, shares = self._left[task], {}
        for first, counts in self._of_ranges:
            ties = int(counts[index, digit])
            shares[first] = min(left, ties), ties
            left -= shares[first][0]
        self._ties[task] = shares

    @property
    def keys(self) -> Sequence[int]:
        """Of the last elements that are selected, when all passes are settled."""
        return self._keys

    def of_range(self, part: Part) -> Limits:
        """The thresholds of a range; indices count from its first element."""
        numel = math.prod(part.shape)
        ends = [min(max(end - part.first, 0), numel) for end in self._ends]
        for task, shares in self._ties.items():
            taken, ties = shares[part.first]
            if taken < ties:
                ends[task] = part.behind(task, self._keys[task], taken) if taken else 0
        return Limits(self._keys, ends)


def _last_kept(counts: NDArray[Any], left: int) -> tuple[int, int, int]:
    """Value of a digit, from the top, in which the `left`-th element is; the elements taken of it, and all of it."""
    from_top = counts[::-1].cumsum()
    place = int(from_top.searchsorted(left))
    ties = int(counts[len(counts) - 1 - place])
    return len(counts) - 1 - place, left - (int(from_top[place]) - ties), ties
