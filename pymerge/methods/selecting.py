"""Where the k largest elements of each task vector end, found at once or in passes over row ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.methods.base import OpRunner
from pymerge.ops.trim_threshold import Thresholds, behind, exact, last_kept

# Bits of the float32 keys that one pass decides, from the top.
_DIGITS = (16, 15)


def passes_to_select(numel: int, counts: Sequence[int]) -> int:
    """How many passes over all ranges a `Selection` needs."""
    return 0 if all(exact(numel, count) is not None for count in counts) else len(_DIGITS)


class Selection:
    """`trim_threshold` of a tensor that may be seen range by range: the same elements, of equal ones the first.

    Either `find` gets the whole tensor, or all ranges are counted and each pass settled, as often as `passes_to_select`
    says. Then `of_range` gives the thresholds of the ranges, in order.
    """

    def __init__(self, run_op: OpRunner, numel: int, counts: Sequence[int]) -> None:
        known = [exact(numel, count) for count in counts]
        self._run_op = run_op
        self._counts = counts
        self._keys = [0 if found is None else found[0] for found in known]
        self._ends = [numel if found is None else found[1] for found in known]
        self._open = [task for task, found in enumerate(known) if found is None]
        self._left = {task: counts[task] for task in self._open}  # to be taken of those that start as the key does
        self._digits = list(_DIGITS)
        self._table: Tensor | None = None

    def find(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        """Look at the whole tensor."""
        found: Thresholds = self._run_op("trim_threshold", base, experts, self._counts)
        self._keys, self._ends = found.keys.tolist(), found.ends.tolist()
        self._left = {}

    def count(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        """Count the magnitudes of a range."""
        if self._open:
            keys, inputs = [self._keys[task] for task in self._open], [experts[task] for task in self._open]
            bits, *lower = self._digits
            table: Tensor = self._run_op("magnitude_counts", base, inputs, keys, sum(lower), bits)
            self._table = table if self._table is None else self._table + table

    def settle(self) -> None:
        """All ranges have been counted."""
        bits = self._digits.pop(0)
        for task, numbers in zip(self._open, [] if self._table is None else self._table.cpu(), strict=True):
            digit, self._left[task], ties = last_kept(numbers, self._left[task])
            self._keys[task] = (self._keys[task] << bits) | digit
            if not self._digits and self._left[task] == ties:
                del self._left[task]
        self._table = None

    def of_range(self, first: int, base: Tensor, experts: Sequence[Tensor]) -> Thresholds:
        """The thresholds of the next range, whose first element has this number; indices count from there."""
        ends = [min(max(end - first, 0), base.numel()) for end in self._ends]
        for task, left in self._left.items():
            key = self._keys[task]
            ties = int(self._run_op("magnitude_counts", base, [experts[task]], [key], 0, 0)) if left else 1
            taken = min(left, ties)
            if taken < ties:
                ends[task] = behind(base, experts[task], key, taken) if taken else 0
            self._left[task] -= taken
        return Thresholds(*(torch.tensor(numbers, device=base.device) for numbers in (self._keys, ends)))
