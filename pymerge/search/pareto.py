"""Pareto fronts: what is best for some preference of the tasks, by NSGA-III of DEAP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
POPULATION, GENERATIONS = 100, 50
CROSSOVER, MUTATION, SPREAD = 0.7, 0.3, 20.0  # probabilities; eta of simulated binary crossover and of mutation


def undominated(costs: Array) -> NDArray[np.bool_]:
    """Mask of K x N costs that no other is as low as everywhere, and lower somewhere; of equal ones the first."""
    order = np.lexsort(costs.T[::-1])
    kept: list[int] = []
    for row in order:  # whoever dominates a row comes before it
        if not kept or not (costs[kept] <= costs[row]).all(axis=1).any():
            kept.append(int(row))
    mask = np.zeros(len(costs), dtype=bool)
    mask[kept] = True
    return mask


def search(
    costs_of: Callable[[Array], Array], tasks: int, bounds: tuple[float, float], seed: int, weights: Array
) -> Array:
    """Search for the front of least costs.

    Args:
        costs_of: K x T coefficients to K x N costs.
        tasks: T.
        bounds: of each coefficient.
        weights: N, of a sum of costs that is to be least at some point of the front.

    Returns K x T coefficients: those of the last population that no other of it dominates, and, as some hundred points
    are far apart where there are many tasks, the minima of the weighted sum and of each cost alone.
    """
    found = _evolve(costs_of, tasks, bounds, seed)
    costs = costs_of(found)
    minima = [
        _downhill(costs_of, found[(costs @ each).argmin()], each, bounds) for each in (weights, *np.eye(len(weights)))
    ]
    found = np.concatenate([found, minima])
    found = found[np.lexsort(found.T[::-1])]
    return np.asarray(found[undominated(costs_of(found))])


def _downhill(costs_of: Callable[[Array], Array], start: Array, weights: Array, bounds: tuple[float, float]) -> Array:
    """The minimum of a weighted sum of costs next to a point."""
    from scipy.optimize import minimize

    result = minimize(
        lambda row: float(costs_of(row[None])[0] @ weights), start, method="L-BFGS-B", bounds=[bounds] * len(start)
    )
    found: Array = np.clip(result.x, *bounds)
    return found


def _evolve(costs_of: Callable[[Array], Array], tasks: int, bounds: tuple[float, float], seed: int) -> Array:
    """K x T coefficients, the last population of NSGA-III."""
    from deap import base, tools

    with _seeded(seed):
        rng = np.random.default_rng(seed)
        start = rng.uniform(*bounds, size=(POPULATION, tasks))
        count = costs_of(start).shape[1]
        fitness = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * count})
        references = reference_points(count)
        size = -(-max(POPULATION, len(references)) // 4) * 4
        start = np.concatenate([start, rng.uniform(*bounds, size=(size - POPULATION, tasks))])
        population = _evaluated([_Individual(row) for row in start], costs_of, fitness)
        # DEAP sorts fronts of a single cost only the slow way.
        select = tools.selNSGA3WithMemory(references, nd="standard" if count == 1 else "log")
        population = select(population, size)
        for _ in range(GENERATIONS):
            children = [_child(population, tools, bounds) for _ in range(size)]
            population = select(population + _evaluated(children, costs_of, fitness), size)
    return np.array(population, dtype=np.float64)


def reference_points(count: int) -> Array:
    """Directions in the space of N costs, some hundred: in one layer, and from N = 8 on in two, as NSGA-III's paper."""
    from deap import tools

    if count == 1:
        return np.ones((1, 1))
    parts = 1
    while comb(count + parts, parts + 1) <= POPULATION:
        parts += 1
    outer = tools.uniform_reference_points(count, parts)
    inner = [tools.uniform_reference_points(count, 1, 0.5)] if parts < 3 else []
    return np.unique(np.concatenate([outer, *inner]), axis=0)


class _Individual(list[float]):
    """Coefficients with a fitness, as DEAP takes them."""

    fitness: Any


def _evaluated(individuals: list[_Individual], costs_of: Callable[[Array], Array], fitness: Any) -> list[_Individual]:
    for each, costs in zip(individuals, costs_of(np.array(individuals, dtype=np.float64)), strict=True):
        each.fitness = fitness(tuple(costs))
    return individuals


def _child(population: list[_Individual], tools: Any, bounds: tuple[float, float]) -> _Individual:
    """A child of two, of one with mutations, or a copy of one (mu + lambda)."""
    chance = random.random()
    if chance < CROSSOVER:
        pair = [_Individual(each) for each in random.sample(population, 2)]
        return _Individual(tools.cxSimulatedBinaryBounded(*pair, eta=SPREAD, low=bounds[0], up=bounds[1])[0])
    one = _Individual(random.choice(population))
    if chance < CROSSOVER + MUTATION:
        tools.mutPolynomialBounded(one, eta=SPREAD, low=bounds[0], up=bounds[1], indpb=1 / len(one))
    return one


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Give the global generators, which DEAP draws from, a seed; and their states back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
