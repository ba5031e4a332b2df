"""Merged tensors that are a weighted sum of the inputs, with weights that norms and angles decide."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pymerge.methods.average import element_count
from pymerge.methods.base import Action, Cost, OpRunner
from pymerge.ops.task_dots import BLOCK, Axis, vector_shape

# Elements of one call of `combine`: its scratch in PyTorch's form stays small however large the tensor is.
_SUM_ELEMENTS = 2**20
_COMBINE_SCRATCH_ITEMS = 4  # float32 accumulator, upcast input and their difference; the block's result


@dataclass(frozen=True)
class InSpan(Action):
    """sum_t c_gt v_t for each vector g, where c is a function of the inner products <v_s, v_t> alone.

    One pass over the inputs for the inner products, one for the sum. What iterates does so on T numbers.
    """

    axis: Axis = "whole"
    whole: ClassVar[bool] = True

    def vectors(self, base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The origin (None: zero) and the models whose differences from it are the v_t."""
        return None, experts

    @abstractmethod
    def weights(self, dots: Tensor) -> Tensor:
        """c, [G, T] float64, from the inner products, [G, T, T] float64; both on the CPU."""

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        origin, models = self.vectors(base, experts)
        dots: Tensor = run_op("task_dots", origin, models, self.axis).cpu()
        weights = self.weights(dots)
        weights = torch.where(dots.isfinite().all(-1), weights, math.nan)
        out_dtype = out_dtype or base.dtype
        if len(weights) != 1:
            merged: Tensor = run_op("combine_vectors", origin, models, weights.to(base.device), self.axis, out_dtype)
            return merged
        return weighted_sum(run_op, origin, models, weights[0].tolist(), out_dtype)

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items, models = element_count(shape), experts + 1
        rows, columns = vector_shape(shape, self.axis)
        vectors = columns if self.axis == "columns" else rows
        blocks = min(items, BLOCK) * 8 * 3 * models  # float64 copies, and those of the product
        sums = 4 * _COMBINE_SCRATCH_ITEMS * min(items, _SUM_ELEMENTS)
        turned = 4 * items * models if self.axis == "columns" else 0
        return Cost((models + 3) * models * items, blocks + sums + turned + 3 * 8 * vectors * models**2)


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
