"""Reductions: map and reduce over the pieces of a tensor, pass after pass, and then its merge, piece by piece."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pymerge.common.arrays import ArrayLike, compute_code
from pymerge.methods.actions import Action, Run
from pymerge.methods.rows import Rows

# Of what a reduction adds up: one tensor, or all tensors of the model that have the same action.
Scope = Literal["tensor", "model"]
# Elements of a piece: reading one is one long request, as for elementwise actions.
RANGE_ELEMENTS = 3 * 2**19
# Pieces start at multiples of so many elements: masks are whole words there, and random numbers whole counters.
_ALIGNMENT = 64


class Reduction(ABC):
    """State of the merge of one tensor: `passes` passes in which every piece is mapped and added, then one that merges.

    `map` and `merge` change nothing: any thread may call them, for several pieces at once. `add` and `end_pass` are
    called by one thread, `add` in the order of the pieces, and `end_pass` when all of a pass have been added. No piece
    is mapped before the pass before has ended.
    """

    passes: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of arrays that it holds after all passes."""
        return 0

    @abstractmethod
    def map(self, run: Run, rows: Rows) -> Any:
        """Contribution of a piece to this pass."""

    @abstractmethod
    def add(self, first: int, mapped: Any) -> None:
        """Take in the contribution of the piece whose first element has this number."""

    @abstractmethod
    def end_pass(self) -> None:
        """Conclude a pass."""

    @abstractmethod
    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        """The merged rows."""

    @abstractmethod
    def finite(self, mapped: Any) -> bool:
        """Whether a contribution to the first pass shows that base and experts are finite in that piece."""

    def serving(self, action: Reduce) -> Reduction:
        """The state, after all passes, for an action of the same `basis`; this one is as it was."""
        return self

    def add_whole(self, run: Run, whole: Rows, pieces: Sequence[Rows]) -> None:
        """Run all passes over a tensor that is in memory, `pieces` its rows; to the same state."""
        for _ in range(self.passes):
            for rows in pieces:
                self.add(rows.first, self.map(run, rows))
            self.end_pass()


@dataclass(frozen=True)
class Reduce(Action):
    """Passes over all pieces that add up what decides the merge, and one that merges, piece by piece.

    The pieces depend on the shape alone (pymerge.methods.reduce.ranges): sums over them are rounded the same whether
    the tensor is in memory or is read again for each pass.
    """

    # Whether an input is float64, of any tensor of the scope: keys to select by then are, and take more passes.
    double: bool = field(default=False, kw_only=True)

    def on(self, *dtypes: str) -> Reduce:
        """The action for inputs of these dtypes."""
        double = "F64" in dtypes
        return self if double == self.double else replace(self, double=double)

    @property
    def scope(self) -> Scope:
        """Extent of one reduction: a tensor, or all tensors of the model that have this very action."""
        return "tensor"

    @property
    def basis(self) -> Hashable:
        """Part of the action that the state after all passes follows from: equal for actions that one can serve."""
        return self

    @abstractmethod
    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        """The state of a merge of one tensor of this shape, before its first pass.

        With the scope "model" the tensors are one vector, in the order of their names, of shape (their elements
        together,).
        """

    @abstractmethod
    def passes(self, shape: tuple[int, ...]) -> int:
        """Number of passes before the one that merges."""

    @abstractmethod
    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Bytes of the state of one tensor between two of its pieces."""

    @property
    def shows_nonfinite(self) -> bool:
        return True


def merge_whole(action: Reduce, run: Run, whole: Rows) -> ArrayLike:
    """Merge a tensor that is in memory; the same bytes as piece by piece."""
    return reduced(action, run, whole).merge(run, whole)


def reduced(action: Reduce, run: Run, whole: Rows) -> Reduction:
    """The state after all passes over a tensor that is in memory."""
    reduction = action.on(compute_code(whole.base, *whole.experts)).start(whole.shape, len(whole.experts))
    several = ranges(whole.shape)
    reduction.add_whole(run, whole, [whole.cut(*rows) for rows in several] if len(several) > 1 else [whole])
    return reduction


def ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last (exclusive) rows of the pieces of a tensor of this shape; a vector is one piece."""
    if len(shape) < 2 or 0 in shape:
        return [(0, shape[0] if shape else 1)]
    row = math.prod(shape[1:])
    unit = _ALIGNMENT // math.gcd(row, _ALIGNMENT)
    height = max(1, RANGE_ELEMENTS // (row * unit)) * unit
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]
