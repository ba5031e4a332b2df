"""Task vectors under masks, of elements kept by magnitude or at random: what the sparse methods do with a tensor."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pymerge.common.shapes import BLOCK, row_bytes
from pymerge.methods.base import Cost
from pymerge.methods.parts import Between, Kept, Part
from pymerge.methods.reduce import Reducing, Reduction, of_part, ranges
from pymerge.methods.selection import BYTES_OF_RANGE, SCRATCH_BYTES, Selection, passes_to_select

# mergekit leaves a task vector as it is where one of its L1 norms is smaller.
_SMALL_NORM = 1e-7
# Bytes that the forms of the ops need: an element of a block in PyTorch's, an element of a row that is ranked in C++.
BLOCK_SCRATCH = 64
_ROW_SCRATCH = 40
# Rows that are ranked at the same time, each thread one of 32 that follow each other.
_ROWS_OF_A_THREAD = 32
_THREADS = 64


@dataclass(frozen=True)
class MergeSparse(Reducing):
    """Masks the task vectors, rescales what is kept to the L1 norm of the whole, and adds the sum to the base."""

    weights: tuple[float, ...]
    elect: bool
    normalize: bool
    rescale: bool
    scale: float

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return experts * row_bytes(math.prod(shape)) if self.rescale else 0

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return experts * row_bytes(math.prod(shape))

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        scratch = experts * row_bytes(items) + BLOCK_SCRATCH * min(items, BLOCK)
        return Cost((12 if self.elect else 9) * experts * items, scratch)


class Sparsifying(Reduction):
    """What the masks of a tensor follow from. Where what is kept is rescaled, that is known only behind all masks: they
    are made in a pass of their own and held, a bit an element."""

    def __init__(self, action: MergeSparse, shape: tuple[int, ...]) -> None:
        self.passes = action.passes(shape)
        self._action = action
        self._before = [0.0] * len(action.weights)  # L1 norms
        self._after = [0.0] * len(action.weights)
        self._factors = [1.0] * len(action.weights)
        self._bits: dict[int, Any] = {}  # by the number of a range's first element

    @abstractmethod
    def masks(self, part: Part) -> Kept:
        """What is kept of a range, with the norms."""

    @abstractmethod
    def mask(self, part: Part) -> Any:
        """The same for `Part.sparse_combine`."""

    def look(self, part: Part) -> Any:
        return self.masks(part)

    def finite(self, seen: Any) -> bool:
        return math.isfinite(seen.before.sum())

    def take(self, first: int, seen: Any) -> None:
        self._bits[first] = seen.bits
        self._before = [a + b for a, b in zip(self._before, seen.before.tolist(), strict=True)]
        self._after = [a + b for a, b in zip(self._after, seen.after.tolist(), strict=True)]

    def settle(self) -> None:
        norms = zip(self._before, self._after, strict=True)
        self._factors = [1.0 if min(pair) < _SMALL_NORM else pair[0] / pair[1] for pair in norms]

    def merge(self, part: Part) -> Any:
        action = self._action
        held = of_part(part, self._bits)
        return part.sparse_combine(
            action.weights,
            mask=part.join(held) if held else self.mask(part),
            factors=self._factors,
            elect=action.elect,
            normalize=action.normalize,
            scale=action.scale,
        )


@dataclass(frozen=True)
class KeepMagnitudes(MergeSparse):
    """Keeps elements whose magnitude has one of certain ranks, the largest having rank 0."""

    first: tuple[float, ...]  # shares of the elements for each expert, see `ranks`
    density: tuple[float, ...]
    outliers: bool
    zeroes_small: bool
    label: ClassVar[str] = "keep magnitudes"

    def ranks(self, numel: int) -> list[tuple[int, int]]:
        """(begin, end) of the ranks that are kept, for each expert."""
        return [self._ranks(numel, *shares) for shares in zip(self.first, self.density, strict=True)]

    def _ranks(self, numel: int, first: float, density: float) -> tuple[int, int]:
        if density >= 1.0:
            return 0, numel
        if not self.outliers:
            return 0, min(numel, max(1, int(density * numel))) if density > 0.0 else 0
        kept = int(density * numel)
        begin = min(int(first * numel), numel - kept)
        return (0, 0) if self.zeroes_small and begin == 0 else (begin, begin + kept)

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Selecting(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return self._passes_to_select(shape) + self.rescale

    def _passes_to_select(self, shape: tuple[int, ...]) -> int:
        numel = math.prod(shape)
        return passes_to_select(numel, [rank for ranks in self.ranks(numel) for rank in ranks])

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        selecting = 0
        if self._passes_to_select(shape):
            of_task = len(ranges(shape)) * BYTES_OF_RANGE + SCRATCH_BYTES
            selecting = (2 if self.outliers else 1) * experts * of_task
        return selecting + super().kept_bytes(shape, experts)

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        tables = (2 if self.outliers else 1) * experts * SCRATCH_BYTES
        return super().plain_bytes(shape, experts) + tables


class Selecting(Sparsifying):
    """Where the ranks begin and end."""

    def __init__(self, action: KeepMagnitudes, shape: tuple[int, ...]) -> None:
        super().__init__(action, shape)
        numel = math.prod(shape)
        begins, ends = zip(*action.ranks(numel), strict=True)
        self._kept = Selection(numel, ends)
        self._dropped = Selection(numel, begins) if any(begins) else None
        self._selections = [each for each in (self._kept, self._dropped) if each is not None]
        self._to_select = self.passes - action.rescale

    def look(self, part: Part) -> Any:
        if not self._to_select:
            return super().look(part)
        return [selection.count(part) for selection in self._selections]

    def finite(self, seen: Any) -> bool:
        if not self._to_select:
            return super().finite(seen)
        return any(selection.finite(counts) for selection, counts in zip(self._selections, seen, strict=True))

    def take(self, first: int, seen: Any) -> None:
        if not self._to_select:
            super().take(first, seen)
            return
        for selection, counts in zip(self._selections, seen, strict=True):
            selection.take(first, counts)

    def settle(self) -> None:
        if not self._to_select:
            super().settle()
            return
        for selection in self._selections:
            selection.settle()
        self._to_select -= 1

    def look_at_all(self, whole: Part, parts: Sequence[Part]) -> None:
        for selection in self._selections:
            selection.find(whole)
        self.passes -= self._to_select
        self._to_select = 0
        super().look_at_all(whole, parts)

    def masks(self, part: Part) -> Kept:
        return part.magnitude_mask(self.mask(part))

    def mask(self, part: Part) -> Between:
        return Between(self._kept.of_range(part), None if self._dropped is None else self._dropped.of_range(part))


@dataclass(frozen=True)
class KeepAtRandom(MergeSparse):
    """Keeps elements with a probability, which may grow with the rank in the row."""

    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    keys: tuple[int, ...]
    label: ClassVar[str] = "keep at random"

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Drawing(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return int(self.rescale)

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        ranks = 0 if self.lowest == self.highest or not shape else _ROW_SCRATCH * shape[-1]
        return super().plain_bytes(shape, experts) + ranks

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        cost = super().cost(shape, experts)
        if self.lowest == self.highest:
            return cost
        columns = shape[-1] if shape else 1
        rows = math.prod(shape) // max(1, columns)
        at_once = min(-(-rows // _ROWS_OF_A_THREAD), _THREADS)
        return Cost(cost.flops, cost.workspace + _ROW_SCRATCH * columns * at_once)


class Drawing(Sparsifying):
    """Random masks follow from the elements' numbers."""

    def __init__(self, action: KeepAtRandom, shape: tuple[int, ...]) -> None:
        super().__init__(action, shape)
        self._draws = (action.lowest, action.highest, action.keys)

    def masks(self, part: Part) -> Kept:
        return part.random_mask(*self._draws, norms=True)

    def mask(self, part: Part) -> Any:
        return part.random_mask(*self._draws, norms=False).bits
