"""Rows of one tensor in the base and all experts: what actions are given, as tensors or as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from pymerge.common.arrays import ArrayLike, rows_of

Known = TypeVar("Known")


class Vectors(NamedTuple):
    """The vectors v_t of an op: W_1 to W_T, with W_0 before them (`with_base`), or less W_0 (`on_base`)."""

    with_base: bool = False
    on_base: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """W_0 and W_t of a piece, of one shape, and where it lies in its tensor. `row` rows come before it."""

    base: ArrayLike
    experts: Sequence[ArrayLike]
    out_dtype: str  # code of the result's dtype
    first: int = 0  # number of the first element in the tensor
    row: int = 0
    out: ArrayLike | None = None  # memory for the result, contiguous

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.base.shape)

    @property
    def numel(self) -> int:
        """Number of elements of each tensor."""
        return math.prod(self.base.shape)

    def vectors(self, which: Vectors) -> tuple[ArrayLike | None, Sequence[ArrayLike]]:
        """The origin (None: zero) and the tensors whose differences from it are the v_t."""
        tensors = [self.base, *self.experts] if which.with_base else self.experts
        return self.base if which.on_base else None, tensors

    def cut(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of these, without memory for a result."""
        experts = [rows_of(expert, start, stop) for expert in self.experts]
        first = self.first + start * math.prod(self.shape[1:])
        return Rows(rows_of(self.base, start, stop), experts, self.out_dtype, first, self.row + start)

    def held(self, by_first: Mapping[int, Known]) -> list[Known]:
        """Values known, by first elements, of the pieces that these rows consist of, in their order."""
        end = self.first + max(1, self.numel)
        return [known for first, known in by_first.items() if self.first <= first < end]
