"""Merged tensors that are a weighted sum of the inputs, with weights that norms and angles decide."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.arrays import ArrayLike
from pymerge.common.shapes import Axis, vector_shape
from pymerge.methods.actions import Run
from pymerge.methods.reduce import Reduce, Reduction
from pymerge.methods.rows import Rows, Vectors
from pymerge.ops.combine import Combine
from pymerge.ops.combine_vectors import CombineVectors
from pymerge.ops.task_dots import TaskDots

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class InSpan(Reduce):
    """sum_t c_gt v_t for each vector g, where c is a function of the inner products <v_s, v_t> alone.

    One pass over the inputs for the inner products, one for the sum. What iterates does so on T numbers.
    """

    axis: Axis = "whole"

    which: ClassVar[Vectors] = Vectors()

    @property
    def vectors(self) -> Vectors:
        """The vectors that are summed."""
        return self.which

    @abstractmethod
    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        """c, [G, T] float64, from the inner products, [G, T, T] float64."""

    @property
    def basis(self) -> Hashable:
        """The inner products."""
        return self.vectors, self.axis

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return InnerProducts(self, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = vector_shape(shape, self.axis)
        # Inner products, weights, and what these are computed from.
        return 3 * 8 * (columns if self.axis == "columns" else rows) * (experts + 1) ** 2

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        models = experts + 1
        return (models + 3) * models * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        turned = (8 if self.double else 4) * math.prod(shape) * (experts + 1) if self.axis == "columns" else 0
        if native:
            return turned
        ops = TaskDots.scratch(shape, experts, native) + Combine.scratch(shape, experts, native)
        return ops + turned + self.kept_bytes(shape, experts)


class InnerProducts(Reduction):
    """The inner products of all pieces, and then the weights."""

    def __init__(self, action: InSpan, shape: tuple[int, ...]) -> None:
        self._action = action
        self._by_rows = action.axis == "rows" and len(shape) > 1  # each piece has vectors of its own
        self._inner = math.prod(shape[1:-1])  # vectors of a row, by rows
        self._found: list[NDArray[Any]] = []
        self._weights: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self._found, self._weights) if each is not None)

    def map(self, run: Run, rows: Rows) -> NDArray[Any]:
        return run(TaskDots(*rows.vectors(self._action.vectors), self._action.axis))

    def finite(self, mapped: NDArray[Any]) -> bool:
        import numpy as np

        return bool(np.isfinite(mapped).all())

    def add(self, first: int, mapped: NDArray[Any]) -> None:
        self._found = [*self._found, mapped] if self._by_rows or not self._found else [self._found[0] + mapped]

    def end_pass(self) -> None:
        import numpy as np

        self._found = [np.concatenate(self._found)]
        self._weigh()

    def serving(self, action: Reduce) -> InnerProducts:
        assert isinstance(action, InSpan)
        other = copy(self)
        other._action = action
        other._weigh()
        return other

    def _weigh(self) -> None:
        """Make weights of the inner products."""
        import numpy as np

        (dots,) = self._found
        with np.errstate(all="ignore"):  # 0 / 0 where there is no angle
            weights = self._action.weights(dots)
        self._weights = np.where(np.isfinite(dots).all(-1), weights, math.nan)

    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        weights, action = self._weights, self._action
        assert weights is not None
        origin, tensors = rows.vectors(action.vectors)
        if len(weights) != 1:
            if self._by_rows:
                weights = weights[rows.row * self._inner : (rows.row + rows.shape[0]) * self._inner]
            return run(CombineVectors(origin, tensors, weights, action.axis, rows.out_dtype, rows.out))
        shares = weights[0].tolist()
        nearer = None if action.vectors.on_base else _nearer(shares)
        if nearer is not None:
            origin, tensors, shares = tensors[nearer], [tensors[1 - nearer]], [shares[1 - nearer]]
        return run(Combine(origin, tensors, shares, rows.out_dtype, rows.out))


def _nearer(weights: Sequence[float]) -> int | None:
    """The number of the model that a sum of two starts at if their weights add up to 1.

    Equal models, and weights of 0 and 1, then give the very values of a model.
    """
    if len(weights) != 2 or sum(weights) != 1.0:
        return None
    return 0 if weights[0] >= weights[1] else 1


def norms(dots: NDArray[Any]) -> NDArray[Any]:
    """||v_t||, [G, T]."""
    import numpy as np

    lengths: NDArray[Any] = np.sqrt(dots.diagonal(axis1=-2, axis2=-1))
    return lengths
