"""A peer of an op: the published form of what it computes, and what that costs.

A form takes the weights (or the system) that the op takes and gives its results, as far as the published code has them.
Its cost is guessed before it is run: operations at the rate of float32 products, and bytes beside the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.harness.layers import Layer, Size


@dataclass(frozen=True)
class Peer:
    """A published form: the op's first results, each within `tolerance` (relative, Frobenius) of the reference's."""

    name: str
    results: Callable[[Layer], tuple[Tensor, ...]]
    work: Callable[[Size], float]
    memory: Callable[[Size], int]
    tolerance: float = 1e-4
