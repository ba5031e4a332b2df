"""Weighted sums of models: linear, task_arithmetic and passthrough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Combine, add_task_vectors, scaled
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.schedules import DECAY, EMA, SCHEDULE, weights_of


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights divided by their sum; ArgumentError if the sum is 0."""
    total = sum_of(weights)
    return tuple(weight / total for weight in weights)


def sum_of(weights: Sequence[float]) -> float:
    """Sum that weights are divided by to be normalised; ArgumentError if it is 0."""
    total = math.fsum(weights)
    if total == 0.0:
        raise ArgumentError(
            f"the weights {list(weights)} add up to 0 and cannot be normalised; change one, or set normalize: false"
        )
    return total


WEIGHT = Parameter("weight", "number", 1.0, "weight of this model", scope="model", required=True)


class Linear(Method):
    """Weighted average of the models listed; the base is only a model like the others, if it is listed.

    With a `schedule` they are checkpoints of one training, in its order, and have the weights of `schedules`.
    """

    name = "linear"
    summary = "weighted average of the models"
    source = "Model Soups, arXiv 2203.05482"
    needs_base = False
    parameters = (
        replace(WEIGHT, instead=SCHEDULE.name),
        Parameter("normalize", "flag", True, "divide the weights by their sum"),
        SCHEDULE,
        DECAY,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if (weights := _scheduled(values, experts)) is not None:
            return Combine(weights, sum_of(weights))
        weights = values.model["weight"]
        return Combine(weights, sum_of(weights) if values.merge["normalize"] else 1.0)

    def shown(self, values: Values) -> Values:
        weights = _scheduled(values, len(values.model["weight"]))
        if weights is None:
            merge = {name: value for name, value in values.merge.items() if name not in (SCHEDULE.name, DECAY.name)}
            return Values(merge, values.model)
        merge = {name: value for name, value in values.merge.items() if name == SCHEDULE.name}
        if merge[SCHEDULE.name] == EMA:
            merge[DECAY.name] = values.merge[DECAY.name]
        return Values(merge, {**values.model, "weight": normalised(weights)})


def _scheduled(values: Values, experts: int) -> tuple[float, ...] | None:
    """The weights of a schedule, None without one."""
    schedule = values.merge[SCHEDULE.name]
    return None if schedule == SCHEDULE.default else weights_of(schedule, experts, values.merge[DECAY.name])


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
        return add_task_vectors([values.merge["lambda"] * weight for weight in weights], divisor)


class Passthrough(Method):
    """W = scale * W_1, bit for bit where scale is 1."""

    name = "passthrough"
    summary = "the tensors of one model, times a factor"
    source = "mergekit"
    needs_base = False
    most_experts = 1
    parameters = (Parameter("scale", "number", 1.0, "factor", scope="model"),)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return scaled(values.model["scale"][0])


METHODS = (Linear(), TaskArithmetic(), Passthrough())
