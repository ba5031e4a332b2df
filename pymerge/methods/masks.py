"""Task vectors under masks, of elements kept by magnitude or at random: what the sparse methods do with a tensor."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pymerge.common.arrays import ArrayLike, join
from pymerge.common.shapes import row_bytes
from pymerge.methods.actions import Run
from pymerge.methods.reduce import Reduce, Reduction, Scope, ranges
from pymerge.methods.rows import Rows
from pymerge.methods.selection import BYTES_OF_PIECE, SCRATCH_BYTES, Magnitudes, Selection, passes_to_select
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.random_mask import RandomMask
from pymerge.ops.sparse_combine import SparseCombine

# mergekit leaves a task vector as it is where one of its L1 norms is smaller.
_SMALL_NORM = 1e-7


@dataclass(frozen=True)
class MergeSparse(Reduce):
    """Masks the task vectors, rescales what is kept to the L1 norm of the whole, and adds the sum to the base."""

    weights: tuple[float, ...]
    elect: bool
    normalize: bool
    rescale: bool
    scale: float

    @property
    def basis(self) -> Hashable:
        """The masks: weights, signs and factors of the sum come after them."""
        return replace(self, weights=(1.0,) * len(self.weights), elect=False, normalize=False, scale=1.0)

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return experts * row_bytes(math.prod(shape)) if self.rescale else 0

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return (12 if self.elect else 9) * experts * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        masks = experts * row_bytes(math.prod(shape))
        return masks + SparseCombine.scratch(shape, experts, native)


class Sparsifying(Reduction):
    """State of masks. Where what is kept is rescaled, the factors are known only behind all masks: they
    are made in a pass of their own and held, a bit an element."""

    def __init__(self, action: MergeSparse, shape: tuple[int, ...]) -> None:
        self.passes = action.passes(shape)
        self._action = action
        self._before = [0.0] * len(action.weights)  # L1 norms
        self._after = [0.0] * len(action.weights)
        self._factors = [1.0] * len(action.weights)
        self._bits: dict[int, ArrayLike] = {}  # by the number of a piece's first element

    @property
    def nbytes(self) -> int:
        return sum(bits.nbytes for bits in self._bits.values())

    def serving(self, action: Reduce) -> Sparsifying:
        assert isinstance(action, MergeSparse)
        other = copy(self)
        other._action = action
        return other

    @abstractmethod
    def masks(self, run: Run, rows: Rows) -> TaskMasks:
        """Masks of a piece, with the norms."""

    @abstractmethod
    def mask(self, run: Run, rows: Rows) -> dict[str, Any]:
        """Masks of a piece as arguments of the op sparse_combine: bits, or thresholds."""

    def map(self, run: Run, rows: Rows) -> Any:
        return self.masks(run, rows)

    def finite(self, mapped: Any) -> bool:
        return math.isfinite(mapped.before.sum())

    def add(self, first: int, mapped: Any) -> None:
        self._bits[first] = mapped.bits
        self._before = [a + b for a, b in zip(self._before, mapped.before.tolist(), strict=True)]
        self._after = [a + b for a, b in zip(self._after, mapped.after.tolist(), strict=True)]

    def end_pass(self) -> None:
        norms = zip(self._before, self._after, strict=True)
        self._factors = [1.0 if min(pair) < _SMALL_NORM else pair[0] / pair[1] for pair in norms]

    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        action, held = self._action, rows.held(self._bits)
        return run(
            SparseCombine(
                rows.base,
                rows.experts,
                action.weights,
                rows.out_dtype,
                **({"bits": join(held, axis=1)} if held else self.mask(run, rows)),
                factors=self._factors,
                elect=action.elect,
                normalize=action.normalize,
                scale=action.scale,
                out=rows.out,
            )
        )


@dataclass(frozen=True)
class KeepMagnitudes(MergeSparse):
    """Keeps elements whose magnitude has one of certain ranks, the largest having rank 0."""

    first: tuple[float, ...]  # shares of the elements for each expert, see `ranks`
    density: tuple[float, ...]
    outliers: bool
    zeroes_small: bool
    scope: Scope = "tensor"
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

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Selecting(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return self._passes_to_select(shape) + self.rescale

    def _passes_to_select(self, shape: tuple[int, ...]) -> int:
        numel = math.prod(shape)
        ranks = [rank for ranks in self.ranks(numel) for rank in ranks]
        return passes_to_select(numel, ranks, double=self.double, of_model=self.scope == "model")

    @property
    def _selections(self) -> int:
        return 2 if self.outliers else 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        selecting = 0
        if self._passes_to_select(shape):
            pieces = 0 if self.scope == "model" else len(ranges(shape)) * BYTES_OF_PIECE
            selecting = self._selections * experts * (pieces + SCRATCH_BYTES)
        return selecting + super().kept_bytes(shape, experts)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        tables = self._selections * experts * SCRATCH_BYTES if native else 0
        return super().scratch(shape, experts, native) + tables


class Selecting(Sparsifying):
    """Selections of where the ranks begin and end."""

    def __init__(self, action: KeepMagnitudes, shape: tuple[int, ...]) -> None:
        super().__init__(action, shape)
        numel = math.prod(shape)
        begins, ends = zip(*action.ranks(numel), strict=True)
        keys = {"double": action.double, "of_model": action.scope == "model"}
        self._kept = Selection(numel, ends, **keys)
        self._dropped = Selection(numel, begins, **keys) if any(begins) else None
        self._selections = [each for each in (self._kept, self._dropped) if each is not None]
        self._to_select = self.passes - action.rescale

    def map(self, run: Run, rows: Rows) -> Any:
        if not self._to_select:
            return super().map(run, rows)
        return [selection.count(run, Magnitudes.of(rows)) for selection in self._selections]

    def finite(self, mapped: Any) -> bool:
        if not self._to_select:
            return super().finite(mapped)
        return any(selection.finite(counts) for selection, counts in zip(self._selections, mapped, strict=True))

    def add(self, first: int, mapped: Any) -> None:
        if not self._to_select:
            super().add(first, mapped)
            return
        for selection, counts in zip(self._selections, mapped, strict=True):
            selection.add(first, counts)

    def end_pass(self) -> None:
        if not self._to_select:
            super().end_pass()
            return
        for selection in self._selections:
            selection.end_pass()
        self._to_select -= 1

    def add_whole(self, run: Run, whole: Rows, pieces: Sequence[Rows]) -> None:
        for selection in self._selections:
            selection.find(run, Magnitudes.of(whole))
        self.passes -= self._to_select
        self._to_select = 0
        super().add_whole(run, whole, pieces)

    def masks(self, run: Run, rows: Rows) -> TaskMasks:
        return run(MagnitudeMask(rows.base, rows.experts, **self.mask(run, rows)))

    def mask(self, run: Run, rows: Rows) -> dict[str, Any]:
        piece = Magnitudes.of(rows)
        dropped = None if self._dropped is None else self._dropped.of_piece(run, piece)
        return {"kept": self._kept.of_piece(run, piece), "dropped": dropped}


@dataclass(frozen=True)
class KeepAtRandom(MergeSparse):
    """Keeps elements with a probability, which may grow with the rank in the row."""

    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    keys: tuple[int, ...]
    label: ClassVar[str] = "keep at random"

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Drawing(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return int(self.rescale)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        ranks = 0 if self.lowest == self.highest else RandomMask.scratch(shape, experts, native)
        return super().scratch(shape, experts, native) + ranks


class Drawing(Sparsifying):
    """Random masks follow from the elements' numbers."""

    def __init__(self, action: KeepAtRandom, shape: tuple[int, ...]) -> None:
        super().__init__(action, shape)
        self._draws = (action.lowest, action.highest, action.keys)

    def masks(self, run: Run, rows: Rows) -> TaskMasks:
        return run(RandomMask(rows.base, rows.experts, *self._draws, rows.first))

    def mask(self, run: Run, rows: Rows) -> dict[str, Any]:
        masks = run(RandomMask(rows.base, rows.experts, *self._draws, rows.first, norms=False))
        return {"bits": masks.bits}
