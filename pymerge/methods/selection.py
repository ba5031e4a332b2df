"""Selection: where the k largest elements of each task vector end, found at once or in passes over pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike
from pymerge.common.shapes import exact
from pymerge.methods.actions import Run
from pymerge.methods.rows import Rows
from pymerge.ops.magnitude_counts import MagnitudeCounts, last_kept
from pymerge.ops.magnitude_place import MagnitudePlace
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bits of the float32 keys that one pass decides, from the top.
_DIGIT = 16
_LAST = 15  # of float32 keys
_INFINITY = 0x7F800000  # its key; those of NaN are larger
# Bytes kept of each piece and task behind the last pass: how many elements have each value of the last digit.
BYTES_OF_PIECE = 4 << _LAST
# Bytes of the counts of one piece, and of all together.
SCRATCH_BYTES = 3 * 8 << _DIGIT


def digits(key_bits: int = 31) -> list[int]:
    """Bits that each pass decides of keys (31 bits in float32, 63 in float64), from the top."""
    return [_DIGIT] * (key_bits // _DIGIT) + [key_bits % _DIGIT]


def passes_to_select(numel: int, counts: Sequence[int], *, frugal: bool = False) -> int:
    """Number of passes over all pieces that a `Selection` needs."""
    return 0 if all(exact(numel, count) is not None for count in counts) else len(digits()) + frugal


class Magnitudes:
    """The task vectors of some rows, or numbers of at least 0 that stand for them, to be selected by magnitude."""

    def __init__(self, base: ArrayLike | None, vectors: Sequence[ArrayLike], rows: Rows) -> None:
        self.base = base
        self.vectors = vectors
        self.first = rows.first
        self.numel = rows.numel

    @classmethod
    def of(cls, rows: Rows) -> Magnitudes:
        """Magnitudes of W_t - W_0."""
        return cls(rows.base, rows.experts, rows)

    @classmethod
    def scores(cls, scores: ArrayLike, rows: Rows, times: int = 1) -> Magnitudes:
        """One number for each element of `rows`, as so many equal vectors."""
        return cls(None, [scores] * times, rows)


class Selection:
    """The op trim_threshold on a tensor that may be seen piece by piece: the same elements, of equal ones the first.

    Either `find` gets the whole tensor, or in each pass all pieces are counted, the counts added in their order and the
    pass ended, as often as `passes_to_select` says. Then `of_piece` gives the thresholds of any piece.

    Args:
        numel: elements of the tensor.
        counts: how many are selected of each task; None: `choose` tells it before the first pass ends, or anything is
            found.
        keys_only: nothing is selected, the key of the last element is wanted, even if that is the least of all.
        bits: of the keys.
        frugal: count in a pass of its own how many elements of each piece have the last key, so that a piece costs
            4 bytes a task, not `BYTES_OF_PIECE`.
    """

    def __init__(
        self,
        numel: int,
        counts: Sequence[int | None],
        *,
        keys_only: bool = False,
        bits: int = 31,
        frugal: bool = False,
    ) -> None:
        known = [None if count is None or keys_only else exact(numel, count) for count in counts]
        self._numel = numel
        self._keys_only = keys_only
        self._counts = list(counts)
        self._keys = [0 if found is None else found[0] for found in known]
        self._ends = [numel if found is None else found[1] for found in known]
        self._open = [task for task, found in enumerate(known) if found is None]
        # To be taken of those that start as the key does.
        self._left = {task: counts[task] or 0 for task in self._open}
        self._digits = [*digits(bits), 0] if frugal else digits(bits)
        self._total: NDArray[Any] | None = None
        self._of_pieces: list[tuple[int, NDArray[Any]]] = []  # number of the first element, counts of the last digit
        self._ties: dict[int, dict[int, tuple[int, int]]] = {}  # by task and first element: how many are taken, of all

    def choose(self, count: int) -> None:
        """Select so many of the only task."""
        self._counts, self._left = [count], {0: count}
        known = exact(self._numel, count)
        if known is not None:
            self._keys, self._ends = [known[0]], [known[1]]
            self._open, self._total = [], None

    def find(self, run: Run, whole: Magnitudes) -> None:
        """Look at the whole tensor."""
        if self._open:
            found = run(TrimThreshold(whole.base, whole.vectors, [count or 0 for count in self._counts]))
            self._keys, self._ends = found.keys.tolist(), found.ends.tolist()

    def count(self, run: Run, piece: Magnitudes) -> NDArray[Any] | None:
        """Numbers of elements of a piece with each value of this pass's digit; None where nothing is open."""
        if not self._open:
            return None
        bits, *lower = self._digits
        vectors = [piece.vectors[task] for task in self._open]
        return run(MagnitudeCounts(piece.base, vectors, [self._keys[task] for task in self._open], sum(lower), bits))

    def finite(self, counts: NDArray[Any] | None) -> bool:
        """Whether the counts of the first digit show that no task has NaN or infinity."""
        if counts is None or len(counts) < len(self._counts):
            return False
        return not counts[:, _INFINITY >> _LAST :].any()

    def add(self, first: int, counts: NDArray[Any] | None) -> None:
        """Add what `count` gave for the next piece."""
        if counts is None:
            return
        if len(self._digits) == 1 and not self._keys_only:
            self._of_pieces.append((first, counts.astype("uint32")))
        if self._total is None:
            self._total = counts
        else:
            self._total += counts

    def end_pass(self) -> None:
        """Decide the digit that all pieces have been counted by."""
        if self._total is None:
            return
        bits = self._digits.pop(0)
        for index, task in enumerate(self._open):
            digit, self._left[task], ties = last_kept(self._total[index], self._left[task])
            self._keys[task] = (self._keys[task] << bits) | digit
            if not self._digits and self._left[task] < ties and not self._keys_only:
                self._share(task, index, digit)
        self._total = None
        if not self._digits:
            self._of_pieces = []

    def _share(self, task: int, index: int, digit: int) -> None:
        """Take of equal elements the first."""
        left, shares = self._left[task], {}
        for first, counts in self._of_pieces:
            ties = int(counts[index, digit])
            shares[first] = min(left, ties), ties
            left -= shares[first][0]
        self._ties[task] = shares

    @property
    def keys(self) -> Sequence[int]:
        """Keys of the last elements that are selected, when all passes have ended."""
        return self._keys

    def of_piece(self, run: Run, piece: Magnitudes) -> Thresholds:
        """The thresholds of a piece; indices count from its first element."""
        import numpy as np

        ends = [min(max(end - piece.first, 0), piece.numel) for end in self._ends]
        for task, shares in self._ties.items():
            taken, ties = shares[piece.first]
            if taken < ties:
                place = MagnitudePlace(piece.base, piece.vectors[task], self._keys[task], taken)
                ends[task] = run(place) if taken else 0
        return Thresholds(np.array(self._keys, np.int64), np.array(ends, np.int64))
