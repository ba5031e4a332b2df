"""MAP: merge a few times, fit a quadratic to each task's metric, and search the fits for their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pymerge.common.libraries import require
from pymerge.common.progress import CountBar
from pymerge.errors import ArgumentError
from pymerge.live.merger import Merger
from pymerge.search.nested import Node, last_two, leaves, mean_by
from pymerge.search.pareto import search
from pymerge.search.sampling import sample
from pymerge.search.surrogate import ACTIVATIONS, fit, least_points, predict, variables_of
from pymerge.search.trials import Evaluate, Trials

Array = NDArray[np.float64]
NESTED_POINTS = 20  # for each two models or merges of models, as in MAP's nested form
SHARES = 0.2, 0.0  # of these, near the equal sum and near one of them


@dataclass(frozen=True, eq=False)
class Front:
    """Coefficients of merges of which none is better for all tasks, by the surrogates.

    Attributes:
        coefficients: K x T, float64: a row are the weights of the models in one merge.
        metrics: K x N, float64: each task's metric there, by the surrogates; `evaluate` was not called for them.
        surrogate: N x (P + 1)(P + 2) / 2, float64: of each metric, before the activation, the coefficients of squares
            c_i^2, then of products c_i c_j for i < j, then of c_i, and the constant. P is T, and 2 if nested.
        parts: P x T: the merges that the surrogate's variables are coefficients of; the identity unless nested.
        samples: S x T coefficients that were merged.
        measured: S x N metrics that `evaluate` gave for them.
        direction, activation: as they were asked for.
        preference: N weights of norm 1.
    """

    coefficients: Array
    metrics: Array
    surrogate: Array
    parts: Array
    samples: Array
    measured: Array
    direction: str
    activation: str
    preference: Array

    @property
    def evaluations(self) -> int:
        """Number of calls of `evaluate`."""
        return len(self.samples)

    def best(self, preference: Sequence[float] | None = None) -> Array:
        """T coefficients of the merge on the front with the best weighted sum of metrics.

        Args:
            preference: a weight of 0 or more for each of N tasks; default: as the search was asked for, or all alike.

        Raises ArgumentError for weights that are not N, negative, or all zero.
        """
        weights = self.preference if preference is None else _unit(preference, self.metrics.shape[1])
        found: Array = self.coefficients[_best_row(self.metrics, weights, self.direction)].copy()
        return found


def map(
    merger: Merger,
    evaluate: Evaluate,
    *,
    points: int | None = None,
    activation: Literal["identity", "sigmoid", "softplus"] = "identity",
    direction: Literal["minimize", "maximize"] = "minimize",
    seed: int = 0,
    nested: bool = False,
    preference: Sequence[float] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    progress: bool = False,
) -> Front:
    """Find merges theta_0 + sum_t c_t tau_t that are best for some preference of the tasks, by few evaluations.

    Source: MAP (arXiv 2406.07529). Merges at sampled points are evaluated; a quadratic is fitted to each metric by
    least squares, and NSGA-III searches the quadratics for their Pareto front.

    Args:
        merger: of a method whose models have a `weight`, as task_arithmetic; its weights are taken as they are
            (`normalize` is off). T is the number of its models.
        evaluate: takes a merge, tensors by name, and gives N numbers, one a task: a sequence, or a mapping.
        points: how many merges are evaluated, at least (T + 1)(T + 2) / 2; default twice as many. If nested: for each
            pair of models or merges, at least 6, default 20.
        activation: of the quadratics: "sigmoid" keeps metrics within 0 and 1 (accuracies), "softplus" above 0 (losses).
        direction: whether lower or higher metrics are better.
        seed: of the sampled points and the search: the same seed gives the same front.
        nested: merge models two by two, those with the closest metrics first: for many models T - 1 searches in two
            coefficients, in place of one in T. N must be T, and task t be that of model t.
        preference: a weight for each task: which merge a nested search goes on with, and `Front.best` takes.
        bounds: of each coefficient in the search. Points are sampled between 0 and 1, where the quadratics hold.
        progress: show a bar on standard error.

    Raises:
        ArgumentError: an argument that is not what it can be; metrics that are not N finite numbers; a library that is
            missing (pip install 'pymerge-engine[search]').
        PymergeError: what merges raise.
    """
    require("search")
    tasks = merger.experts
    _check(merger, activation, direction, bounds, seed)
    pairs = nested and tasks > 2
    count = _points(points, tasks, nested)
    weights = None if preference is None and not pairs else _unit(preference, tasks if pairs else None)
    rng = np.random.default_rng(seed)
    total = tasks + count * (tasks - 1) if pairs else count
    with CountBar("evaluating merges", total, shown=progress) as bar:
        trials = Trials(merger, evaluate, bar)
        parts = np.eye(tasks)
        if pairs:
            assert weights is not None
            parts = _two_merges(trials, count, weights, activation, direction, bounds, rng)
        sampled = sample(len(parts), count, rng, *(SHARES if pairs else ()))
        measured = trials.measure(sampled @ parts)
    weights = _unit(preference, measured.shape[1])
    surrogate = fit(sampled, measured, activation)
    rows = _front(surrogate, activation, direction, bounds, seed, weights)
    metrics = predict(surrogate, rows, activation)
    return Front(
        rows @ parts, metrics, surrogate, parts, trials.samples, trials.measured, direction, activation, weights
    )


def _two_merges(
    trials: Trials,
    points: int,
    weights: Array,
    activation: str,
    direction: str,
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> Array:
    """2 x T coefficients of the two merges that are left when models are joined two by two."""
    alone = trials.measure(np.eye(len(weights)))
    if alone.shape[1] != len(weights):
        raise ArgumentError(
            f"evaluate gave {alone.shape[1]} numbers for {len(weights)} models; nested=True takes one task for each "
            "model; leave it out for other numbers of tasks"
        )

    def join(left: Node, right: Node) -> Node:
        parts = np.stack([left.coefficients, right.coefficients])
        sampled = sample(2, points, rng, *SHARES)
        measured = trials.measure(sampled @ parts)
        means = np.stack([mean_by(weights, measured, node.tasks) for node in (left, right)], axis=1)
        surrogate = fit(sampled, means, activation)
        own = np.array([weights[list(node.tasks)].sum() for node in (left, right)])
        own = own if own.any() else np.ones(2)
        rows = _front(surrogate, activation, direction, bounds, int(rng.integers(2**31)), own)
        metrics = predict(surrogate, rows, activation)
        row = _best_row(metrics, own, direction)
        return Node(rows[row] @ parts, (*left.tasks, *right.tasks), float(metrics[row] @ own / own.sum()))

    return np.stack([node.coefficients for node in last_two(leaves(alone), join)])


def _front(
    surrogate: Array, activation: str, direction: str, bounds: tuple[float, float], seed: int, weights: Array
) -> Array:
    """K x P coefficients on the Pareto front of the surrogates, with those that are best by some weights."""
    sign = 1.0 if direction == "minimize" else -1.0
    variables = variables_of(surrogate.shape[1])
    return search(lambda rows: sign * predict(surrogate, rows, activation), variables, bounds, seed, weights)


def _best_row(metrics: Array, weights: Array, direction: str) -> int:
    sums = metrics @ weights
    return int(sums.argmin() if direction == "minimize" else sums.argmax())


def _check(merger: Merger, activation: str, direction: str, bounds: tuple[float, float], seed: int) -> None:
    if "weight" not in merger.varying:
        raise ArgumentError(
            f"the models of {merger.report().method} have no weights that may vary; give a Merger of task_arithmetic, "
            "or of another method that has them"
        )
    choices = {"activation": (activation, ACTIVATIONS), "direction": (direction, ("minimize", "maximize"))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ArgumentError(f"{name}={value!r} is not known; give one of {', '.join(known)}")
    if not isinstance(seed, Integral) or seed < 0:
        raise ArgumentError(f"seed={seed!r}: give a whole number from 0 on; the same one gives the same front")
    pair = _numbers(bounds)
    if pair is None or pair.shape != (2,) or not (np.isfinite(pair).all() and pair[0] < pair[1]):
        raise ArgumentError(f"bounds={bounds!r}: give two numbers, the lower one first")


def _numbers(values: object) -> Array | None:
    """Values as an array; None where they are no numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _points(points: int | None, tasks: int, nested: bool) -> int:
    """Number of merges that are evaluated, at a time if nested."""
    variables = min(tasks, 2) if nested else tasks
    least = least_points(variables)
    if points is None:
        return NESTED_POINTS if nested else 2 * least
    if not isinstance(points, Integral) or points < least:
        raise ArgumentError(
            f"points={points!r}: a quadratic in {variables} coefficients has {least} of its own, and needs as many "
            f"points at least; give points={least} or more"
        )
    return points


def _unit(preference: Sequence[float] | None, tasks: int | None) -> Array:
    """Weights of norm 1, all alike if there is no preference; their number is not checked if it is not known."""
    if preference is None:
        assert tasks is not None
        return np.full(tasks, 1 / math.sqrt(tasks))
    weights = _numbers(preference)
    if weights is None or weights.ndim != 1 or (tasks is not None and len(weights) != tasks):
        each = "each task" if tasks is None else f"each of {tasks} tasks"
        raise ArgumentError(f"preference={preference!r}: give a weight for {each}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ArgumentError(f"preference={preference!r}: give weights of 0 or more, one above 0 at least")
    return np.asarray(weights / np.linalg.norm(weights))
