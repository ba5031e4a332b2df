"""Merged tensors that are a weighted sum of the inputs, with weights that norms and angles decide."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.methods.average import element_count
from pymerge.methods.base import Cost, OpRunner
from pymerge.methods.reducing import Reducing, Reduction
from pymerge.ops.task_dots import BLOCK, Axis, vector_shape

# Elements of one call of `combine`: its scratch in PyTorch's form stays small however large the tensor is.
_SUM_ELEMENTS = 2**20
_COMBINE_SCRATCH_ITEMS = 4  # float32 accumulator, upcast input and their difference; the block's result


@dataclass(frozen=True)
class InSpan(Reducing):
    """sum_t c_gt v_t for each vector g, where c is a function of the inner products <v_s, v_t> alone.

    One pass over the inputs for the inner products, one for the sum. What iterates does so on T numbers.
    """

    axis: Axis = "whole"

    def vectors(self, base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The origin (None: zero) and the models whose differences from it are the v_t."""
        return None, experts

    @abstractmethod
    def weights(self, dots: Tensor) -> Tensor:
        """c, [G, T] float64, from the inner products, [G, T, T] float64; both on the CPU."""

    def reduction(self, run_op: OpRunner, shape: tuple[int, ...], experts: int) -> Reduction:
        return InnerProducts(self, run_op, shape)

    def passes(self, shape: tuple[int, ...]) -> int:
        return 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = vector_shape(shape, self.axis)
        # Inner products, weights, and what these are computed from.
        return 3 * 8 * (columns if self.axis == "columns" else rows) * (experts + 1) ** 2

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items, models = element_count(shape), experts + 1
        blocks = min(items, BLOCK) * 8 * 3 * models  # float64 copies, and those of the product
        sums = 4 * _COMBINE_SCRATCH_ITEMS * min(items, _SUM_ELEMENTS)
        turned = 4 * items * models if self.axis == "columns" else 0
        return Cost((models + 3) * models * items, blocks + sums + turned + self.kept_bytes(shape, experts))


class InnerProducts(Reduction):
    """The inner products of all ranges, and then the weights."""

    def __init__(self, action: InSpan, run_op: OpRunner, shape: tuple[int, ...]) -> None:
        self._action = action
        self._run_op = run_op
        self._by_rows = action.axis == "rows" and len(shape) > 1  # each range has vectors of its own
        self._inner = element_count(shape[1:-1])  # vectors of a row, by rows
        self._found: list[Tensor] = []
        self._weights = torch.empty(0)

    def look(self, start: int, base: Tensor, experts: Sequence[Tensor]) -> None:
        origin, models = self._action.vectors(base, experts)
        dots: Tensor = self._run_op("task_dots", origin, models, self._action.axis).cpu()
        self._found = [*self._found, dots] if self._by_rows or not self._found else [self._found[0] + dots]

    def settle(self) -> None:
        dots = torch.cat(self._found)
        self._found = []
        self._weights = torch.where(dots.isfinite().all(-1), self._action.weights(dots), math.nan)

    def merge(self, start: int, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
        origin, models = self._action.vectors(base, experts)
        if len(self._weights) == 1:
            return weighted_sum(self._run_op, origin, models, self._weights[0].tolist(), out_dtype)
        weights = self._weights
        if self._by_rows:
            weights = weights[start * self._inner : (start + len(base)) * self._inner]
        merged: Tensor = self._run_op(
            "combine_vectors", origin, models, weights.to(base.device), self._action.axis, out_dtype
        )
        return merged


def weighted_sum(
    run_op: OpRunner, origin: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype
) -> Tensor:
    """W_0 + sum_t c_t (W_t - W_0) for an origin W_0, else sum_t c_t W_t, block by block.

    Two weights that add up to 1 go from the nearer model: equal models, and weights of 0 and 1, then give the very
    values of a model.
    """
    if origin is None and len(models) == 2 and sum(weights) == 1.0:
        near = 0 if weights[0] >= weights[1] else 1
        origin, models, weights = models[near], [models[1 - near]], [weights[1 - near]]
    merged = torch.empty(models[0].shape, dtype=out_dtype, device=models[0].device)
    target, flat = merged.view(-1), [model.reshape(-1) for model in models]
    start = None if origin is None else origin.reshape(-1)
    for at in range(0, merged.numel(), _SUM_ELEMENTS):
        here = slice(at, at + _SUM_ELEMENTS)
        target[here] = run_op(
            "combine", None if start is None else start[here], [each[here] for each in flat], weights, out_dtype
        )
    return merged


def norms(dots: Tensor) -> Tensor:
    """||v_t||, [G, T]."""
    return dots.diagonal(dim1=-2, dim2=-1).sqrt()
