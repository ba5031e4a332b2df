"""arcee_fusion: the elements of one model whose importance reaches a threshold, else the base's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.arrays import ArrayLike
from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Method, Values
from pymerge.methods.reduce import Reduce, Reduction
from pymerge.methods.rows import Rows
from pymerge.methods.selection import SCRATCH_BYTES, Magnitudes, Selection, digits
from pymerge.ops import arcee_fusion
from pymerge.ops.importance import Importance
from pymerge.ops.row_divergence import RowDivergence

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUARTERS = (1, 2, 3)


@dataclass(frozen=True)
class TakeImportant(Reduce):
    """W_1 where its importance reaches a threshold, else W_0."""

    label: ClassVar[str] = "take important"

    @property
    def shows_nonfinite(self) -> bool:
        return False

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Important(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return len(digits(self.double))

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 8 * math.prod(shape[:-1]) + len(_QUARTERS) * SCRATCH_BYTES

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 40 * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        ops = RowDivergence.scratch(shape, experts, native) + arcee_fusion.ArceeFusion.scratch(shape, experts, native)
        # Scores; of tensors counted in float64, and copies. Counts of the quartiles.
        scores = ((8 if self.double else 4) if native else 2 * 8) * math.prod(shape)
        return ops + scores + (len(_QUARTERS) * SCRATCH_BYTES if native else 0)


class Important(Reduction):
    """The divergences of the rows, and the quartiles of the importances that follow from them."""

    def __init__(self, action: TakeImportant, shape: tuple[int, ...]) -> None:
        numel = math.prod(shape)
        # The value of rank r from below is the least of the numel - r largest.
        self._counts = [numel - (numel - 1) * quarter // 4 for quarter in _QUARTERS] if numel else []
        self._by_row: dict[int, NDArray[Any]] = {}  # divergences, by the number of a piece's first element
        self._selection = Selection(numel, self._counts, keys_only=True, double=action.double)
        self._double = action.double
        self.passes = action.passes(shape)

    def map(self, run: Run, rows: Rows) -> Any:
        known = self._by_row.get(rows.first)
        divergence = run(RowDivergence(rows.base, rows.experts[0])) if known is None else known
        scores = run(Importance(rows.base, rows.experts[0], divergence))
        return divergence, self._selection.count(run, Magnitudes.scores(scores, rows, len(_QUARTERS)))

    def finite(self, mapped: Any) -> bool:
        return math.isfinite(mapped[0].sum())

    def add(self, first: int, mapped: Any) -> None:
        self._by_row[first], counts = mapped
        self._selection.add(first, counts)

    def end_pass(self) -> None:
        self._selection.end_pass()

    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        import numpy as np

        held = rows.held(self._by_row)
        divergence = held[0] if len(held) == 1 else np.concatenate(held)
        return run(
            arcee_fusion.ArceeFusion(
                rows.base, rows.experts[0], divergence, self._threshold(), rows.out_dtype, rows.out
            )
        )

    def _threshold(self) -> float:
        """Q_1/2 + 1.5 (Q_3/4 - Q_1/4), in the dtype of the importances."""
        import numpy as np

        if not self._counts:
            return 0.0
        integer, number = (np.int64, np.float64) if self._double else (np.int32, np.float32)
        with np.errstate(all="ignore"):
            low, middle, high = np.array(self._selection.keys, integer).view(number)
            return float(middle + number(1.5) * (high - low))


class ArceeFusion(Method):
    """The model's elements where |W_1 - W_0| times the row's divergence is at least Q_1/2 + 1.5 (Q_3/4 - Q_1/4).

    Quantiles are those of all elements (op `arcee_fusion`); mergekit's are those of a random sample of 10^6 where there
    are more.
    """

    name = "arcee_fusion"
    summary = "the elements of one model whose importance reaches a threshold, else the base's"
    source = "Arcee AI, mergekit"
    most_experts = 1
    parameters = ()

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return TakeImportant()


METHODS = (ArceeFusion(),)
