"""What decides over elements is known of the whole tensor: sce by variance, arcee_fusion by importance, ramplus_tl by
how many elements each model touches alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.shapes import BLOCK, row_bytes
from pymerge.methods.base import Cost
from pymerge.methods.parts import Between, Part
from pymerge.methods.reduce import Reducing, Reduction, of_part, ranges
from pymerge.methods.selection import BYTES_OF_RANGE, SCRATCH_BYTES, Selection, digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What the references need for each element that they work on at once: task vectors, also stacked, masks and sums.
_BYTES_OF_TASK, _BYTES_OF_SUMS = 24, 48
# Rows in float64, and what softmax and logarithm make of them.
_BYTES_OF_DIVERGENCE = 48
_QUARTERS = (1, 2, 3)


def _block_bytes(shape: tuple[int, ...], experts: int) -> int:
    return min(math.prod(shape), BLOCK) * (_BYTES_OF_TASK * experts + _BYTES_OF_SUMS)


@dataclass(frozen=True)
class SelectCalculateErase(Reducing):
    """W_0 + sum_t w_t keep_t tau_t / sum_t w_t keep_t, over the elements whose variance is among the largest."""

    select_topk: float
    least: float
    label: ClassVar[str] = "select, calculate, erase"

    @property
    def selects(self) -> bool:
        return self.select_topk < 1.0

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Differing(self, shape, experts)

    def passes(self, shape: tuple[int, ...]) -> int:
        return (len(digits()) if self.selects else 0) + 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        if not self.selects:
            return 0
        return len(ranges(shape)) * BYTES_OF_RANGE + SCRATCH_BYTES + row_bytes(math.prod(shape))

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        items = math.prod(shape)
        return 4 * items + row_bytes(items) + SCRATCH_BYTES if self.selects else 0

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        # Variances, the zeros that they are compared with, masks; float64 at most.
        selecting = 2 * 8 * items + row_bytes(items) if self.selects else 0
        return Cost(10 * experts * items, selecting + _block_bytes(shape, experts))


class Differing(Reduction):
    """Which elements differ most, and the energies of the task vectors over them."""

    def __init__(self, action: SelectCalculateErase, shape: tuple[int, ...], experts: int) -> None:
        self.passes = action.passes(shape)
        self._action = action
        self._numel = math.prod(shape)
        self._selection = Selection(self._numel, [None]) if action.selects else None
        self._to_select = self.passes - 1
        self._nonzero: int | None = 0 if action.selects else None  # None: no longer of interest
        self._energies = [0.0] * experts
        self._weights: list[float] = []
        self._bits: dict[int, Any] = {}  # of what is merged, by the number of a range's first element; None for all

    def look(self, part: Part) -> Any:
        if not self._to_select:
            bits = self._mask(part)
            return part.energies(bits), bits
        assert self._selection is not None
        scores = part.spread()
        return self._selection.count(scores), 0 if self._nonzero is None else scores.nonzero()

    def finite(self, seen: Any) -> bool:
        if not self._to_select:
            return math.isfinite(seen[0].sum())
        assert self._selection is not None
        return self._selection.finite(seen[0])

    def take(self, first: int, seen: Any) -> None:
        if not self._to_select:
            energies, self._bits[first] = seen
            self._energies = [total + energy for total, energy in zip(self._energies, energies.tolist(), strict=True)]
            return
        assert self._selection is not None
        counts, nonzero = seen
        self._selection.take(first, counts)
        if self._nonzero is not None:
            self._nonzero += nonzero

    def settle(self) -> None:
        if not self._to_select:
            energies = [energy / max(1, self._numel) for energy in self._energies]
            self._weights = task_weights(energies, self._action.least)
            return
        assert self._selection is not None
        if self._nonzero is not None:
            self._choose(self._nonzero)
        self._selection.settle()
        self._to_select -= 1

    def look_at_all(self, whole: Part, parts: Sequence[Part]) -> None:
        if self._selection is not None:
            scores = whole.spread()
            self._choose(scores.nonzero())
            self._selection.find(scores)
        self.passes -= self._to_select
        self._to_select = 0
        super().look_at_all(whole, parts)

    def merge(self, part: Part) -> Any:
        bits = of_part(part, self._bits)
        return part.majority_mean(self._weights, None if bits[0] is None else part.join(bits), self._action.least)

    def _choose(self, nonzero: int) -> None:
        assert self._selection is not None
        self._selection.choose(int(nonzero * self._action.select_topk))
        self._nonzero = None

    def _mask(self, part: Part) -> Any:
        """Which elements are merged; None for all."""
        if self._selection is None:
            return None
        scores = part.spread()
        return scores.magnitude_mask(Between(self._selection.of_range(scores), None)).bits


def task_weights(energies: Sequence[float], least_energy: float) -> list[float]:
    """Energies divided by their sum; equal weights where that is 0 or less than `least_energy`."""
    total = sum(energies)
    if total == 0.0 or total < least_energy:
        return [1.0 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


@dataclass(frozen=True)
class TakeImportant(Reducing):
    """W_1 where its importance reaches a threshold, else W_0."""

    label: ClassVar[str] = "take important"

    @property
    def shows_nonfinite(self) -> bool:
        return False

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Important(shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return len(digits())

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 8 * math.prod(shape[:-1]) + len(_QUARTERS) * SCRATCH_BYTES

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        # Scores, two rows in float64, divergences, counts.
        rows = 2 * 8 * (shape[-1] if shape else 1) + 8 * math.prod(shape[:-1])
        return 4 * math.prod(shape) + rows + len(_QUARTERS) * SCRATCH_BYTES

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        row = max(BLOCK, shape[-1] if shape else 1)
        # Scores and the zeros that they are compared with, float64 at most; float64 rows.
        return Cost(40 * items, 2 * 8 * items + min(items, row) * _BYTES_OF_DIVERGENCE + _block_bytes(shape, 1))


class Important(Reduction):
    """The divergences of the rows, and the quartiles of the importances that follow from them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        numel = math.prod(shape)
        # The value of rank r from below is the least of the numel - r largest.
        self._counts = [numel - (numel - 1) * quarter // 4 for quarter in _QUARTERS] if numel else []
        self._by_row: dict[int, NDArray[Any]] = {}  # divergences, by the number of a range's first element
        self._selection = Selection(numel, self._counts, keys_only=True)
        self._key_bits = 31
        self.passes = len(digits())

    def look(self, part: Part) -> Any:
        known = self._by_row.get(part.first)
        divergence = part.divergence() if known is None else known
        return divergence, self._selection.count(part.importance(divergence, len(_QUARTERS)))

    def finite(self, seen: Any) -> bool:
        return math.isfinite(seen[0].sum())

    def take(self, first: int, seen: Any) -> None:
        self._by_row[first], counts = seen
        self._selection.take(first, counts)

    def settle(self) -> None:
        self._selection.settle()

    def look_at_all(self, whole: Part, parts: Sequence[Part]) -> None:
        self._key_bits = whole.key_bits
        self.passes = len(digits(whole.key_bits))
        self._selection = Selection(math.prod(whole.shape), self._counts, keys_only=True, bits=whole.key_bits)
        super().look_at_all(whole, parts)

    def merge(self, part: Part) -> Any:
        import numpy as np

        rows = of_part(part, self._by_row)
        return part.take_important(rows[0] if len(rows) == 1 else np.concatenate(rows), self._threshold())

    def _threshold(self) -> float:
        """Q_1/2 + 1.5 (Q_3/4 - Q_1/4), in the dtype of the importances."""
        import numpy as np

        if not self._counts:
            return 0.0
        integer, number = (np.int64, np.float64) if self._key_bits == 63 else (np.int32, np.float32)
        with np.errstate(all="ignore"):
            low, middle, high = np.array(self._selection.keys, integer).view(number)
            return float(middle + number(1.5) * (high - low))


@dataclass(frozen=True)
class MeanOfActivePlus(Reducing):
    """W_0 + the mean of the task vectors that touch an element, with larger shares of what one alone touches."""

    epsilon: float
    r: float
    alpha: float
    label: ClassVar[str] = "mean of active"

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Alone(self, experts)

    def passes(self, shape: tuple[int, ...]) -> int:
        return 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 0

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 0

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        return Cost(8 * experts * math.prod(shape), _block_bytes(shape, experts))


class Alone(Reduction):
    """How many elements each task vector alone touches, and how many it shares."""

    def __init__(self, action: MeanOfActivePlus, experts: int) -> None:
        self._action = action
        self._counts = [[0, 0]] * experts
        self._factors: list[float] = []

    def look(self, part: Part) -> NDArray[Any]:
        return part.active_counts(self._action.epsilon)

    def finite(self, seen: NDArray[Any]) -> bool:
        return False  # counts don't tell

    def take(self, first: int, seen: NDArray[Any]) -> None:
        rows = zip(self._counts, seen.tolist(), strict=True)
        self._counts = [[lone + more_lone, shared + more] for (lone, shared), (more_lone, more) in rows]

    def settle(self) -> None:
        self._factors = lone_factors(self._counts, self._action.r, self._action.alpha)

    def merge(self, part: Part) -> Any:
        return part.mean_of_active(self._action.epsilon, self._factors)


def lone_factors(counts: Sequence[Sequence[int]], r: float, alpha: float) -> list[float]:
    """1 + r min(s_t / u_t, alpha) of each task; 1 where u_t is 0, and nothing is multiplied."""
    return [1.0 + r * min(shared / lone, alpha) if lone else 1.0 for lone, shared in counts]
