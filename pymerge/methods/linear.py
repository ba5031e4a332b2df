"""Weighted sums: linear, task_arithmetic and passthrough, and what other methods do with tensors they don't solve.

Nothing here imports PyTorch: where files are combined as they are read, it is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.errors import ArgumentError
from pymerge.methods.base import Action, Combination, Cost, Method, OpRunner, Parameter, Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Row chunks of a combine are read as float32 in PyTorch's form: accumulator, upcast input, and their difference.
_COMBINE_SCRATCH_ITEMS = 3


@dataclass(frozen=True)
class Copy(Action):
    """Takes the base's tensor as it is."""

    label: ClassVar[str] = "copy"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return base.to(out_dtype or base.dtype)

    @property
    def shows_nonfinite(self) -> bool:
        return True

    @property
    def combination(self) -> Combination:
        return Combination(on_base=True)

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        return Cost(0, 0)


@dataclass(frozen=True)
class WeightedSum(Action):
    """(sum_t w_t W_t) / divisor."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    label: ClassVar[str] = "weighted sum"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        merged: Tensor = run_op("combine", None, experts, self.weights, out_dtype or base.dtype, None, self.divisor)
        return merged

    def run_into(self, out: Tensor, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        merged: Tensor = run_op("combine", None, experts, self.weights, out.dtype, out, self.divisor)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return all(self.weights)

    @property
    def combination(self) -> Combination:
        return Combination(self.weights, self.divisor)

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        return Cost(2 * experts * items, 4 * _COMBINE_SCRATCH_ITEMS * items)


@dataclass(frozen=True)
class Scaled(Action):
    """The only model, times a number; with 1, bit for bit."""

    factor: float = 1.0
    label: ClassVar[str] = "scale"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        (model,) = experts
        out_dtype = out_dtype or base.dtype
        if self.factor == 1.0:
            return model.to(out_dtype)
        merged: Tensor = run_op("combine", None, experts, (self.factor,), out_dtype)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return self.factor != 0.0

    @property
    def combination(self) -> Combination:
        return Combination(() if self.factor == 1.0 else (self.factor,))

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        return WeightedSum((self.factor,)).cost(shape, experts)


@dataclass(frozen=True)
class AddTaskVectors(Action):
    """W_0 + (sum_t w_t tau_t) / divisor."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    label: ClassVar[str] = "add task vectors"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        merged: Tensor = run_op("combine", base, experts, self.weights, out_dtype, None, self.divisor)
        return merged

    def run_into(self, out: Tensor, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        merged: Tensor = run_op("combine", base, experts, self.weights, out.dtype, out, self.divisor)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return all(self.weights)

    @property
    def combination(self) -> Combination:
        return Combination(self.weights, self.divisor, on_base=True)

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        return Cost(3 * experts * items, 4 * _COMBINE_SCRATCH_ITEMS * items)


def mean_of_tasks(experts: int) -> AddTaskVectors:
    """W_0 + (1/T) sum_t tau_t, the average of the fine-tuned weights."""
    return AddTaskVectors((1.0,) * experts, float(experts))


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights divided by their sum; ArgumentError if the sum is 0."""
    total = sum_of(weights)
    return tuple(weight / total for weight in weights)


def sum_of(weights: Sequence[float]) -> float:
    """What normalised weights are divided by; ArgumentError if it is 0."""
    total = math.fsum(weights)
    if total == 0.0:
        raise ArgumentError(
            f"the weights {list(weights)} add up to 0 and cannot be normalised; change one, or set normalize: false"
        )
    return total


WEIGHT = Parameter("weight", "number", 1.0, "weight of this model", scope="model", required=True)


class Linear(Method):
    """Weighted average of the models listed; the base is only a model like the others, if it is listed."""

    name = "linear"
    summary = "weighted average of the models"
    source = "Model Soups, arXiv 2203.05482"
    needs_base = False
    parameters = (WEIGHT, Parameter("normalize", "flag", True, "divide the weights by their sum"))

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        weights = values.model["weight"]
        return WeightedSum(weights, sum_of(weights) if values.merge["normalize"] else 1.0)


class TaskArithmetic(Method):
    """Base plus the weighted sum of task vectors."""

    name = "task_arithmetic"
    summary = "base + lambda * sum_t weight_t * tau_t"
    source = "Task Arithmetic, arXiv 2212.04089"
    parameters = (
        WEIGHT,
        Parameter("normalize", "flag", False, "divide the weights by their sum"),
        Parameter("lambda", "number", 1.0, "factor of the sum"),
        Parameter("density", "number", 1.0, "used by other methods", scope="model", no_effect=True),
        Parameter("int8_mask", "flag", False, "used by other methods", no_effect=True),
        Parameter("rescale", "flag", False, "used by other methods", no_effect=True),
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        weights = values.model["weight"]
        divisor = sum_of(weights) if values.merge["normalize"] else 1.0
        return AddTaskVectors(tuple(values.merge["lambda"] * weight for weight in weights), divisor)


class Passthrough(Method):
    """W = scale * W_1, bit for bit where scale is 1."""

    name = "passthrough"
    summary = "the tensors of one model, times a factor"
    source = "mergekit"
    needs_base = False
    most_experts = 1
    parameters = (Parameter("scale", "number", 1.0, "factor", scope="model"),)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return Scaled(values.model["scale"][0])


METHODS = (Linear(), TaskArithmetic(), Passthrough())
