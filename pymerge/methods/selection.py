"""Selection: where the k largest elements of each task vector end, found at once or in passes over pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike, compute_code
from pymerge.common.shapes import exact
from pymerge.methods.actions import Run
from pymerge.methods.rows import Rows
from pymerge.ops.magnitude_counts import MagnitudeCounts, last_kept
from pymerge.ops.magnitude_place import MagnitudePlace
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bits of the keys that one pass decides, from the top.
_DIGIT = 16
_LAST = 15  # which those of float32 and of float64 both end with
_INFINITY = 0x7F800000  # its key in float32; those of NaN are larger
# Bytes kept of each piece and task behind the last pass: how many elements have each value of the last digit.
BYTES_OF_PIECE = 4 << _LAST
# Bytes of the counts of one piece, and of all together.
SCRATCH_BYTES = 3 * 8 << _DIGIT


def digits(double: bool) -> list[int]:
    """Bits that each pass decides, from the top, of keys of 31 bits, or of 63 where deltas are float64."""
    return [*[_DIGIT] * (3 if double else 1), _LAST]


def passes_to_select(numel: int, counts: Sequence[int], *, double: bool = False, of_model: bool = False) -> int:
    """Number of passes over all pieces that a `Selection` needs."""
    return 0 if all(exact(numel, count) is not None for count in counts) else len(digits(double)) + of_model


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
        double: an input is float64, and so are the keys of the tasks whose deltas it is in.
        of_model: the pieces are those of many tensors. How many elements of each one have the last key is counted in a
            pass of its own, so that a piece costs 4 bytes a task, not `BYTES_OF_PIECE`. And where any tensor is float64
            the keys of all are, to be compared.
    """

    def __init__(
        self,
        numel: int,
        counts: Sequence[int | None],
        *,
        keys_only: bool = False,
        double: bool = False,
        of_model: bool = False,
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
        self._digits = [*digits(double), 0] if of_model else digits(double)
        self._double = double
        self._converts = double and of_model
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
        prefixes = [self._keys[task] for task in self._open]
        return run(MagnitudeCounts(piece.base, vectors, prefixes, sum(lower), bits, self._converts))

    def finite(self, counts: NDArray[Any] | None) -> bool:
        """Whether the counts of the first digit show that no task has NaN or infinity."""
        if counts is None or len(counts) < len(self._counts) or self._double:
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

        keys, ends = list(self._keys), [min(max(end - piece.first, 0), piece.numel) for end in self._ends]
        for task in self._open if self._converts else ():
            if compute_code(piece.base, piece.vectors[task]) == "F32":
                keys[task], same = in_float32(keys[task])
                ends[task] = ends[task] if same else 0
        for task, shares in self._ties.items():
            taken, ties = shares[piece.first]
            if taken < ties:
                place = MagnitudePlace(piece.base, piece.vectors[task], keys[task], taken)
                ends[task] = run(place) if taken else 0
        return Thresholds(np.array(keys, np.int64), np.array(ends, np.int64))


def magnitudes(keys: Sequence[int]) -> list[float]:
    """The magnitudes that keys stand for, of float32 or, where they are larger than its keys can be, of float64."""
    import numpy as np

    found = np.array(keys, np.int64)
    if (found >> 31).any():
        return [float(each) for each in found.view(np.float64)]
    return [float(each) for each in found.astype(np.int32).view(np.float32)]


def in_float32(key: int) -> tuple[int, bool]:
    """The largest key of float32 that is not above one of float64, and whether both are the same number."""
    import numpy as np

    with np.errstate(over="ignore"):
        number = np.array(key).view(np.float64)
        nearest = number.astype(np.float32)
        below = np.where(nearest > number, np.nextafter(nearest, np.float32(0.0)), nearest)
    return int(below.view(np.int32)), int(below.astype(np.float64).view(np.int64)) == key
