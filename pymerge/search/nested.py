"""The nested form of MAP: models are merged two by two, until two are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Node(NamedTuple):
    """A merge of some models.

    Attributes:
        coefficients: T, of all models.
        tasks: numbers of those that it is made of.
        metric: mean of its tasks' metrics, by preference.
    """

    coefficients: Array
    tasks: tuple[int, ...]
    metric: float


def leaves(measured: Array) -> list[Node]:
    """The models by themselves, of T x T metrics: row t those of model t."""
    return [Node(unit, (task,), measured[task, task]) for task, unit in enumerate(np.eye(len(measured)))]


def last_two(nodes: Sequence[Node], join: Callable[[Node, Node], Node]) -> tuple[Node, Node]:
    """Join nodes level by level, those with the closest metrics first, until two are left."""
    level = sorted(nodes, key=lambda node: node.metric)
    while len(level) > 2:
        alone = level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=False)
        level = sorted([*(join(*pair) for pair in pairs), *alone], key=lambda node: node.metric)
    return level[0], level[1]


def mean_by(weights: Array, metrics: Array, tasks: Sequence[int]) -> Array:
    """K means of the metrics, K x N, of some tasks; where none has a weight they count alike."""
    own = weights[list(tasks)]
    found: Array = metrics[:, list(tasks)] @ (own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / len(own)))
    return found
