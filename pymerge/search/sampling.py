"""Points at which merges are evaluated, before a surrogate is fitted to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR_EQUAL, NEAR_ONE = 0.25, 0.25
_NOISE = 0.1


def sample(
    tasks: int,
    points: int,
    rng: np.random.Generator,
    near_equal: float = NEAR_EQUAL,
    near_one: float = NEAR_ONE,
) -> NDArray[np.float64]:
    """Points x T coefficients in [0, 1]: each model alone, sums of all, models with noise, and points anywhere.

    Of the points beside the models themselves a share is near sums with equal coefficients, half of them exactly, and a
    share near one model.

    MAP takes a regular grid for the last part. With T = 6 and more it has two levels, 0 and 1, where a square cannot be
    told from a coefficient; a Latin hypercube has as many levels as points.
    """
    rest = max(points - tasks, 0)
    equal, one = int(rest * near_equal), int(rest * near_one)
    diagonal = rng.uniform(size=(equal, 1)) * np.ones(tasks)
    diagonal[equal // 2 :] += rng.normal(scale=_NOISE, size=(equal - equal // 2, tasks))
    corners = np.eye(tasks)[np.arange(one) % tasks] + rng.normal(scale=_NOISE, size=(one, tasks))
    spread = _latin_hypercube(tasks, rest - equal - one, rng)
    return np.concatenate([np.eye(tasks)[:points], np.clip(np.concatenate([diagonal, corners, spread]), 0, 1)])


def _latin_hypercube(tasks: int, points: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A Latin hypercube: in each coordinate one point in each of as many equal intervals as there are points."""
    intervals = np.stack([rng.permutation(points) for _ in range(tasks)], axis=1)
    found: NDArray[np.float64] = (intervals + rng.uniform(size=(points, tasks))) / max(points, 1)
    return found
