"""Case: an op as it is timed, the work it cannot avoid, and its peer, the published form of what it computes.

A form takes the weights (or the system) that the op takes and gives its results, as far as the published code has them.
Its cost is guessed before it is run: operations at the rate of float32 products, and bytes beside the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from benchmarks.harness.layers import Layer, Size
from pymerge.ops._op import Op


@dataclass(frozen=True)
class Peer:
    """A published form: the op's first results, each within `tolerance` (relative, Frobenius) of the reference's."""

    name: str
    results: Callable[[Layer], tuple[Tensor, ...]]
    work: Callable[[Size], float]
    memory: Callable[[Size], int]
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Case:
    """One op on a layer, and what it costs.

    `flops` is the least number of operations (half of a product that is symmetric), `bytes` what inputs and outputs
    take, each once, for weights of so many bytes an element. `work` is how many operations at the rate of float32
    products the reference takes about as long as: only to guess whether there is time for it.
    """

    op: Callable[[Layer], Op[Any]]
    flops: Callable[[Layer], float]
    bytes: Callable[[Size, int], int]
    work: Callable[[Size], float]
    # Whose GEMM rate is the limit: the weights' dtype, or what the op computes in whatever the weights are. Ops that
    # start from (A, B) are timed once, not for each dtype of weights.
    computes: Literal["weights", "float32", "float64"] = "weights"
    settings: str = ""
    peer: Peer | None = None


def weights_read(size: Size, item: int) -> int:
    """Bytes of a base and its experts."""
    return (size.tasks + 1) * size.numel * item
