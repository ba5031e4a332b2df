"""Merged tensors that are a weighted sum of the inputs, with weights that norms and angles decide."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.shapes import BLOCK, Axis, vector_shape
from pymerge.methods.base import Cost
from pymerge.methods.parts import SUM_ELEMENTS, Models, Part
from pymerge.methods.reduce import Reducing, Reduction

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What PyTorch's form of `combine` needs for each element: a float32 accumulator, the upcast input and their difference;
# the block's result.
_COMBINE_SCRATCH_ITEMS = 4


@dataclass(frozen=True)
class InSpan(Reducing):
    """sum_t c_gt v_t for each vector g, where c is a function of the inner products <v_s, v_t> alone.

    One pass over the inputs for the inner products, one for the sum. What iterates does so on T numbers.
    """

    axis: Axis = "whole"

    models: ClassVar[Models] = Models()

    @property
    def vectors(self) -> Models:
        """What the v_t are."""
        return self.models

    @abstractmethod
    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        """c, [G, T] float64, from the inner products, [G, T, T] float64."""

    @property
    def plain(self) -> bool:
        return self.axis == "whole"

    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return InnerProducts(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = vector_shape(shape, self.axis)
        # Inner products, weights, and what these are computed from.
        return 3 * 8 * (columns if self.axis == "columns" else rows) * (experts + 1) ** 2

    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 0

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items, models = math.prod(shape), experts + 1
        blocks = min(items, BLOCK) * 8 * 3 * models  # float64 copies, and those of the product
        sums = 4 * _COMBINE_SCRATCH_ITEMS * min(items, SUM_ELEMENTS)
        turned = 4 * items * models if self.axis == "columns" else 0
        return Cost((models + 3) * models * items, blocks + sums + turned + self.kept_bytes(shape, experts))


class InnerProducts(Reduction):
    """The inner products of all ranges, and then the weights."""

    def __init__(self, action: InSpan, shape: tuple[int, ...]) -> None:
        self._action = action
        self._by_rows = action.axis == "rows" and len(shape) > 1  # each range has vectors of its own
        self._inner = math.prod(shape[1:-1])  # vectors of a row, by rows
        self._found: list[NDArray[Any]] = []
        self._weights: NDArray[Any] | None = None

    def look(self, part: Part) -> NDArray[Any]:
        return part.task_dots(self._action.vectors, self._action.axis)

    def finite(self, seen: NDArray[Any]) -> bool:
        import numpy as np

        return bool(np.isfinite(seen).all())

    def take(self, first: int, seen: NDArray[Any]) -> None:
        self._found = [*self._found, seen] if self._by_rows or not self._found else [self._found[0] + seen]

    def settle(self) -> None:
        import numpy as np

        dots = np.concatenate(self._found)
        self._found = []
        with np.errstate(all="ignore"):  # 0 / 0 where there is no angle
            weights = self._action.weights(dots)
        self._weights = np.where(np.isfinite(dots).all(-1), weights, math.nan)

    def merge(self, part: Part) -> Any:
        weights = self._weights
        assert weights is not None
        if len(weights) == 1:
            return part.combine(self._action.vectors, weights[0].tolist())
        if self._by_rows:
            weights = weights[part.row * self._inner : (part.row + part.shape[0]) * self._inner]
        return part.combine_vectors(self._action.vectors, weights, self._action.axis)


def norms(dots: NDArray[Any]) -> NDArray[Any]:
    """||v_t||, [G, T]."""
    import numpy as np

    lengths: NDArray[Any] = np.sqrt(dots.diagonal(axis1=-2, axis2=-1))
    return lengths
