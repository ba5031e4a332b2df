"""sce: select elements by variance over the models, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pymerge.common.arrays import ArrayLike, join
from pymerge.common.shapes import row_bytes
from pymerge.methods.actions import Action, Run
from pymerge.methods.base import COMPAT, Method, Parameter, Values
from pymerge.methods.reduce import Reduce, Reduction, ranges
from pymerge.methods.rows import Rows
from pymerge.methods.selection import BYTES_OF_PIECE, SCRATCH_BYTES, Magnitudes, Selection, digits
from pymerge.ops import sce
from pymerge.ops.magnitude_counts import MagnitudeCounts
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.sce_energies import SceEnergies
from pymerge.ops.sce_spread import SceSpread

_MERGEKITS_LEAST = 1e-6  # sum of energies, sum of weights


@dataclass(frozen=True)
class SelectCalculateErase(Reduce):
    """W_0 + sum_t w_t keep_t tau_t / sum_t w_t keep_t, over the elements whose variance is among the largest."""

    select_topk: float
    least: float
    label: ClassVar[str] = "select, calculate, erase"

    @property
    def selects(self) -> bool:
        """Whether not all elements are merged."""
        return self.select_topk < 1.0

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Differing(self, shape, experts)

    def passes(self, shape: tuple[int, ...]) -> int:
        return (len(digits(self.double)) if self.selects else 0) + 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        if not self.selects:
            return 0
        return len(ranges(shape)) * BYTES_OF_PIECE + SCRATCH_BYTES + row_bytes(math.prod(shape))

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 10 * experts * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        items = math.prod(shape)
        # Variances and masks; of tensors counted in float64, and copies.
        variances = (8 if self.double else 4) * items + SCRATCH_BYTES if native else 2 * 8 * items
        selecting = variances + row_bytes(items) if self.selects else 0
        return selecting + sce.Sce.scratch(shape, experts, native)


class Differing(Reduction):
    """Selection of the elements that differ most, and the energies of the task vectors over them."""

    def __init__(self, action: SelectCalculateErase, shape: tuple[int, ...], experts: int) -> None:
        self.passes = action.passes(shape)
        self._action = action
        self._numel = math.prod(shape)
        self._selection = Selection(self._numel, [None], double=action.double) if action.selects else None
        self._to_select = self.passes - 1
        self._nonzero: int | None = 0 if action.selects else None  # None: no longer of interest
        self._energies = [0.0] * experts
        self._weights: list[float] = []
        self._bits: dict[int, ArrayLike | None] = {}  # by the number of a piece's first element; None: all is merged

    @property
    def nbytes(self) -> int:
        return sum(bits.nbytes for bits in self._bits.values() if bits is not None)

    def map(self, run: Run, rows: Rows) -> Any:
        if not self._to_select:
            bits = self._mask(run, rows)
            return run(SceEnergies(rows.base, rows.experts, bits)), bits
        assert self._selection is not None
        scores = self._scores(run, rows)
        nonzero = 0 if self._nonzero is None else _count_nonzero(run, scores)
        return self._selection.count(run, scores), nonzero

    def finite(self, mapped: Any) -> bool:
        if not self._to_select:
            return math.isfinite(mapped[0].sum())
        assert self._selection is not None
        return self._selection.finite(mapped[0])

    def add(self, first: int, mapped: Any) -> None:
        if not self._to_select:
            energies, self._bits[first] = mapped
            self._energies = [total + energy for total, energy in zip(self._energies, energies.tolist(), strict=True)]
            return
        assert self._selection is not None
        counts, nonzero = mapped
        self._selection.add(first, counts)
        if self._nonzero is not None:
            self._nonzero += nonzero

    def end_pass(self) -> None:
        if not self._to_select:
            energies = [energy / max(1, self._numel) for energy in self._energies]
            self._weights = task_weights(energies, self._action.least)
            return
        assert self._selection is not None
        if self._nonzero is not None:
            self._choose(self._nonzero)
        self._selection.end_pass()
        self._to_select -= 1

    def add_whole(self, run: Run, whole: Rows, pieces: Sequence[Rows]) -> None:
        if self._selection is not None:
            scores = self._scores(run, whole)
            self._choose(_count_nonzero(run, scores))
            self._selection.find(run, scores)
        self.passes -= self._to_select
        self._to_select = 0
        super().add_whole(run, whole, pieces)

    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        held = [bits for bits in rows.held(self._bits) if bits is not None]
        bits = join(held, axis=1) if held else None
        return run(sce.Sce(rows.base, rows.experts, self._weights, bits, self._action.least, rows.out_dtype, rows.out))

    def _choose(self, nonzero: int) -> None:
        assert self._selection is not None
        self._selection.choose(int(nonzero * self._action.select_topk))
        self._nonzero = None

    def _mask(self, run: Run, rows: Rows) -> ArrayLike | None:
        """Bits of the elements that are merged; None for all."""
        if self._selection is None:
            return None
        scores = self._scores(run, rows)
        return run(MagnitudeMask(scores.base, scores.vectors, self._selection.of_piece(run, scores))).bits

    @staticmethod
    def _scores(run: Run, rows: Rows) -> Magnitudes:
        """The variances of the task vectors at each element."""
        return Magnitudes.scores(run(SceSpread(rows.base, rows.experts)), rows)


def _count_nonzero(run: Run, scores: Magnitudes) -> int:
    """Number of scores that are not 0."""
    (zeros,) = run(MagnitudeCounts(scores.base, scores.vectors, [0], 0, 0))[0]
    return scores.numel - int(zeros)


def task_weights(energies: Sequence[float], least_energy: float) -> list[float]:
    """Energies divided by their sum; equal weights where that is 0 or less than `least_energy`."""
    total = sum(energies)
    if total == 0.0 or total < least_energy:
        return [1.0 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


class Sce(Method):
    """Select elements by variance over the models, calculate weights by energy, erase minority signs (op `sce`).

    `compat: mergekit` weighs tasks equally where their mean squares add up to less than 1e-6, as those of most
    fine-tunes do, and divides by 1e-6 at least.
    """

    name = "sce"
    summary = "base + weighted mean of the task vectors of the majority's sign, where models differ most"
    source = "FuseChat-3.0, arXiv 2408.07990"
    parameters = (
        Parameter("select_topk", "number", 1.0, "share of the elements that is merged, by variance", minimum=0.0),
        Parameter("int8_mask", "flag", False, "the result is the same", no_effect=True),
        COMPAT,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        least = _MERGEKITS_LEAST if values.merge["compat"] == "mergekit" else 0.0
        return SelectCalculateErase(values.merge["select_topk"], least)


METHODS = (Sce(),)
