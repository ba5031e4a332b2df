"""Exact selection by magnitude: where the k largest elements of each task vector end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.common.arrays import ArrayLike, compute_code
from pymerge.common.shapes import exact
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_length, check_vectors, numel_of
from pymerge.ops.magnitude_counts import MagnitudeCounts, last_kept
from pymerge.ops.magnitude_place import MagnitudePlace

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGIT = 11  # bits


class Thresholds(NamedTuple):
    """The k largest magnitudes of task t are those with a key above keys[t], and those equal to it whose element index
    is below ends[t]. A key is the magnitude's bits as an integer.
    """

    keys: NDArray[Any]  # [T] int64
    ends: NDArray[Any]  # [T] int64


@dataclass(frozen=True, eq=False)
class TrimThreshold(Op[Thresholds]):
    """Thresholds of the k_t largest |tau_t| of each task.

    Elements of equal magnitude are taken in the order of their index, so exactly k_t are selected. NaN counts as larger
    than infinity. Where all elements at the threshold are taken, ends[t] is numel; otherwise it is the index behind the
    last one. Deltas in float32 (float64 if an input is). Radix selection from the top: no sort, and no copy of the
    task vector. Source: the trim step of TIES-Merging, arXiv 2306.01708.
    """

    summary = "k-th largest |tau_t| by radix selection, ties in order of the index"

    base: ArrayLike | None  # W_0, any shape, floating point; None: the experts themselves are the vectors
    experts: Sequence[ArrayLike]  # T tensors W_t like it
    counts: Sequence[int]  # T numbers k_t, 0 to numel

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree and each count is one of 0 to the number of elements."""
        numel = numel_of(check_vectors("trim_threshold", self.base, self.experts))
        check_length("trim_threshold", "counts", self.counts, len(self.experts))
        for count in self.counts:
            if not 0 <= count <= numel:
                raise ArgumentError(f"trim_threshold: count {count} of {numel} elements; give 0 to {numel}")

    def known(self) -> tuple[Thresholds, list[int]]:
        """Thresholds of the tasks of which nothing or everything is selected, and the numbers of the other tasks.

        Those are still to be filled in.
        """
        import numpy as np

        numel = numel_of(self.like)
        found = [exact(numel, count) for count in self.counts]
        keys, ends = (np.array([(each or (0, 0))[i] for each in found], np.int64) for i in (0, 1))
        return Thresholds(keys, ends), [task for task, each in enumerate(found) if each is None]

    def reference(self) -> Thresholds:
        """Search one task after the other."""
        thresholds, searched = self.known()
        for task in searched:
            found = _search(self.base, self.experts[task], self.counts[task])
            thresholds.keys[task], thresholds.ends[task] = found
        return thresholds


def check_thresholds(op: str, thresholds: Thresholds | None, tasks: int) -> None:
    """Raise ArgumentError unless there are none, or one for each task, as TrimThreshold gives them."""
    if thresholds is None:
        return
    if not len(thresholds.keys) == len(thresholds.ends) == tasks:
        raise ArgumentError(
            f"{op}: {len(thresholds.keys)} thresholds for {tasks} experts; "
            "take them from trim_threshold on the same experts"
        )
    for numbers in thresholds:
        if numbers.dtype != "int64" or not numbers.flags.c_contiguous:
            raise ArgumentError(f"{op}: thresholds are {numbers.dtype}; give contiguous arrays of int64")


def _search(base: ArrayLike | None, expert: ArrayLike, count: int) -> tuple[int, int]:
    """Key and end of one task."""
    prefix, left, bits = 0, count, 63 if compute_code(base, expert) == "F64" else 31
    ties = numel = numel_of(expert)
    while bits:
        digit = min(_DIGIT, bits)
        bits -= digit
        counts = MagnitudeCounts(base, [expert], [prefix], bits, digit).reference()[0]
        place, left, ties = last_kept(counts, left)
        prefix = (prefix << digit) | place
    return prefix, numel if left == ties else MagnitudePlace(base, expert, prefix, left).reference()
