"""Ops as they are timed: for each the op on a layer, the work it cannot avoid, and its published form.

To add an op, add a `Case` to CASES; tests/repository/test_benchmarks.py says which are missing. A further case of an op
has a name of its own behind a dash: its times are reported, and `auto` chooses by the first case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.harness.layers import DENSITY, EPSILON, SAMPLES, TIME, TOKENS, Layer, Size
from benchmarks.peers import mergekit_elementwise, mergekit_sparse
from benchmarks.peers import ops as published
from benchmarks.peers.peer import Peer
from pymerge.ops._op import Op
from pymerge.ops.arcee_fusion import ArceeFusion
from pymerge.ops.combine import Combine
from pymerge.ops.combine_vectors import CombineVectors
from pymerge.ops.gradient_flow import GradientFlow, schedule
from pymerge.ops.importance import Importance
from pymerge.ops.isotropic import Isotropic
from pymerge.ops.magnitude_counts import MagnitudeCounts
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.magnitude_place import MagnitudePlace
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.nearswap import Nearswap
from pymerge.ops.normal_equations import NormalEquations, outputs_first
from pymerge.ops.ram import Ram
from pymerge.ops.ram_counts import RamCounts
from pymerge.ops.random_mask import RandomMask
from pymerge.ops.routed_linear import RoutedLinear
from pymerge.ops.row_divergence import RowDivergence
from pymerge.ops.sce import Sce
from pymerge.ops.sce_energies import SceEnergies
from pymerge.ops.sce_spread import SceSpread
from pymerge.ops.singular_sum import SingularSum
from pymerge.ops.sparse_combine import SparseCombine
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.spectral_filter import SpectralFilter
from pymerge.ops.spectral_refine import SpectralRefine
from pymerge.ops.task_dots import TaskDots
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.task_sum import TaskSum
from pymerge.ops.trim_threshold import TrimThreshold
from pymerge.ops.wudi_adam import WudiAdam

ADAM_STEPS = 5
LR = 1e-5
EIGEN = 90  # time of float64 eigenvectors on one thread, in n^3 operations at the rate of float32 products


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


def _gram(size: Size) -> int:
    return size.tasks * size.product // 2


def _equations(size: Size) -> int:
    first = outputs_first(size.d_out, size.d_in)
    each = 4 * size.d_out**2 * size.d_in if first else size.product
    return _gram(size) + size.tasks * each


def _weights_read(size: Size, item: int) -> int:
    return (size.tasks + 1) * size.numel * item


def _probabilities(size: Size, epsilon: float) -> tuple[list[float], list[float]]:
    low, high = DENSITY - epsilon, DENSITY + epsilon
    return [low] * size.tasks, [high] * size.tasks


def _refine(size: Size) -> float:
    """A symmetric Gram, its eigenvectors (reduction and back-transformation, 10/3 n^3), and two products."""
    large = size.numel // size.small
    return large * size.small**2 + 10 / 3 * size.small**3 + 4 * size.numel * size.k


def op_of(name: str) -> str:
    """The op of a case."""
    return name.partition("-")[0]


CASES = {
    "routed_linear": Case(
        lambda layer: RoutedLinear(*layer.routed),
        flops=lambda layer: 2 * SAMPLES * (TOKENS + layer.size.tasks) * layer.size.numel,
        bytes=lambda size, item: (2 * size.tasks + 4) * size.numel + 4 * SAMPLES * TOKENS * (size.d_in + size.d_out),
        work=lambda size: 4 * SAMPLES * (TOKENS + 40 * size.tasks) * size.numel,
        computes="float32",
        settings=f"{SAMPLES} samples of {TOKENS} tokens",
        peer=published.ROUTED_LINEAR,
    ),
    "mix_weights": Case(
        lambda layer: MixWeights(*layer.mixed),
        flops=lambda layer: 2 * SAMPLES * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (2 * size.tasks + 4 + 4 * SAMPLES) * size.numel,
        work=lambda size: 160 * SAMPLES * size.tasks * size.numel,
        computes="float32",
        settings=f"{SAMPLES} rows of gates",
        peer=published.MIX_WEIGHTS,
    ),
    "combine": Case(
        lambda layer: Combine(layer.base, layer.experts, [0.3] * layer.size.tasks),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 300 * size.tasks * size.numel,
        peer=published.COMBINE,
    ),
    "trim_threshold": Case(
        lambda layer: TrimThreshold(layer.base, layer.experts, layer.counts),
        flops=lambda layer: layer.size.tasks * layer.size.numel,
        bytes=_weights_read,
        work=lambda size: 2000 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=mergekit_sparse.TRIM_THRESHOLD,
    ),
    "magnitude_counts": Case(
        lambda layer: MagnitudeCounts(layer.base, layer.experts, [0] * layer.size.tasks, 15, 16),
        flops=lambda layer: layer.size.tasks * layer.size.numel,
        bytes=_weights_read,
        work=lambda size: 700 * size.tasks * size.numel,
        settings="first of two digits",
        peer=mergekit_sparse.MAGNITUDE_COUNTS,
    ),
    "magnitude_place": Case(
        lambda layer: MagnitudePlace(layer.base, layer.experts[0], int(layer.thresholds.keys[0]), 1),
        flops=lambda layer: layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item,
        work=lambda size: 700 * size.numel,
        settings="last element of its magnitude",
        peer=mergekit_sparse.MAGNITUDE_PLACE,
    ),
    "magnitude_mask": Case(
        lambda layer: MagnitudeMask(layer.base, layer.experts, layer.thresholds),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: _weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 1500 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=mergekit_sparse.MAGNITUDE_MASK,
    ),
    "random_mask": Case(
        lambda layer: RandomMask(layer.base, layer.experts, *_probabilities(layer.size, 0.0), range(layer.size.tasks)),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: _weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 1500 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=mergekit_sparse.RANDOM_MASK,
    ),
    "random_mask-ranks": Case(
        lambda layer: RandomMask(
            layer.base,
            layer.experts,
            *_probabilities(layer.size, EPSILON),
            range(layer.size.tasks),
        ),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: _weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 6000 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}, epsilon {EPSILON:g}",
        peer=mergekit_sparse.RANDOM_MASK_RANKS,
    ),
    "sparse_combine": Case(
        lambda layer: SparseCombine(
            layer.base, layer.experts, [1.0] * layer.size.tasks, bits=layer.masks.bits, elect=True, normalize=True
        ),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: _weights_read(size, item) + item * size.numel + size.tasks * size.numel // 8,
        work=lambda size: 900 * size.tasks * size.numel,
        peer=mergekit_sparse.SPARSE_COMBINE,
    ),
    "combine_vectors": Case(
        lambda layer: CombineVectors(layer.base, layer.experts, mergekit_elementwise.row_weights(layer), "rows"),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 600 * size.tasks * size.numel,
        settings="by rows",
        peer=mergekit_elementwise.COMBINE_VECTORS,
    ),
    "task_dots": Case(
        lambda layer: TaskDots(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * (layer.size.tasks + 2) * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item,
        work=lambda size: 300 * size.tasks * (size.tasks + 1) * size.numel,
        peer=mergekit_elementwise.TASK_DOTS,
    ),
    "nearswap": Case(
        lambda layer: Nearswap(layer.base, layer.experts[0], mergekit_elementwise.T),
        flops=lambda layer: 8 * layer.size.numel,
        bytes=lambda size, item: 3 * size.numel * item,
        work=lambda size: 600 * size.numel,
        peer=mergekit_elementwise.NEARSWAP,
    ),
    "ram": Case(
        lambda layer: Ram(layer.base, layer.experts, mergekit_elementwise.EPSILON),
        flops=lambda layer: 4 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=mergekit_elementwise.RAM,
    ),
    "ram_counts": Case(
        lambda layer: RamCounts(layer.base, layer.experts, mergekit_elementwise.EPSILON),
        flops=lambda layer: 4 * layer.size.tasks * layer.size.numel,
        bytes=_weights_read,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=mergekit_elementwise.RAM_COUNTS,
    ),
    "sce_spread": Case(
        lambda layer: SceSpread(layer.base, layer.experts),
        flops=lambda layer: 5 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: _weights_read(size, item) + 4 * size.numel,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=mergekit_elementwise.SCE_SPREAD,
    ),
    "sce_energies": Case(
        lambda layer: SceEnergies(layer.base, layer.experts),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=_weights_read,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=mergekit_elementwise.SCE_ENERGIES,
    ),
    "sce": Case(
        lambda layer: Sce(layer.base, layer.experts, layer.shares),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 1000 * size.tasks * size.numel,
        peer=mergekit_elementwise.SCE,
    ),
    "row_divergence": Case(
        lambda layer: RowDivergence(layer.base, layer.experts[0]),
        flops=lambda layer: 40 * layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item,
        work=lambda size: 2000 * size.numel,
        peer=mergekit_elementwise.ROW_DIVERGENCE,
    ),
    "importance": Case(
        lambda layer: Importance(layer.base, layer.experts[0], mergekit_elementwise.row_divergence(layer)),
        flops=lambda layer: 2 * layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item + 4 * size.numel,
        work=lambda size: 600 * size.numel,
        peer=mergekit_elementwise.IMPORTANCE,
    ),
    "arcee_fusion": Case(
        lambda layer: ArceeFusion(
            layer.base,
            layer.experts[0],
            mergekit_elementwise.row_divergence(layer),
            mergekit_elementwise.least_important(layer),
        ),
        flops=lambda layer: 4 * layer.size.numel,
        bytes=lambda size, item: 3 * size.numel * item,
        work=lambda size: 1000 * size.numel,
        peer=mergekit_elementwise.ARCEE_FUSION,
    ),
    "task_stats": Case(
        lambda layer: TaskStats(layer.base, layer.experts),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item,
        work=lambda size: 2000 * size.tasks * size.numel,
        peer=published.TASK_STATS,
    ),
    "task_sum": Case(
        lambda layer: TaskSum(layer.base, layer.experts, layer.shares),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + 4 * size.numel,
        work=lambda size: 300 * size.tasks * size.numel,
        peer=published.TASK_SUM,
    ),
    "task_gram": Case(
        lambda layer: TaskGram(layer.base, layer.experts, layer.shares),
        flops=lambda layer: _gram(layer.size),
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + 4 * size.d_in**2,
        work=lambda size: 2 * _gram(size),
        peer=published.TASK_GRAM,
    ),
    "normal_equations": Case(
        lambda layer: NormalEquations(layer.base, layer.experts, layer.shares, origin=layer.start),
        flops=lambda layer: _equations(layer.size),
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + size.system,
        work=lambda size: 2 * _equations(size),
        peer=published.NORMAL_EQUATIONS,
    ),
    "wudi_adam": Case(
        lambda layer: WudiAdam(*layer.equations, ADAM_STEPS, LR),
        flops=lambda layer: ADAM_STEPS * layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: 2 * ADAM_STEPS * size.product,
        computes="float32",
        settings=f"{ADAM_STEPS} steps",
        peer=published.wudi_adam(ADAM_STEPS, LR),
    ),
    "gradient_flow": Case(
        lambda layer: GradientFlow(*layer.equations, TIME),
        flops=lambda layer: layer.flow_flops,
        bytes=lambda size, item: size.system,
        # The largest eigenvalue of A is at most its trace, T.
        work=lambda size: 2 * schedule(size.d_out, size.d_in, size.tasks * TIME).flops,
        computes="float32",
        settings=f"t={TIME:g}",
        peer=published.by_eigenvectors(TIME),
    ),
    "spectral_filter": Case(
        lambda layer: SpectralFilter(*layer.equations, TIME, 1.0),
        flops=lambda layer: 10 / 3 * layer.size.d_in**3 + 2 * layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: EIGEN * size.d_in**3 / 2 + 2 * size.product,
        computes="float32",
        settings=f"t={TIME:g}, all directions",
        peer=published.by_eigenvectors(TIME),
    ),
    "spd_solve": Case(
        lambda layer: SpdSolve(layer.regular, layer.equations[1], layer.equations[0].mean(0)),
        flops=lambda layer: layer.size.d_in**3 / 3 + layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: 4 * (size.d_in**3 / 3 + size.product),
        computes="float32",
        peer=published.SPD_SOLVE,
    ),
    "spectral_refine": Case(
        lambda layer: SpectralRefine(layer.equations[1], layer.start, layer.size.k),
        flops=lambda layer: _refine(layer.size),
        bytes=lambda size, item: 12 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 8 * size.numel * size.small,
        computes="float64",
        peer=published.SPECTRAL_REFINE,
    ),
    "singular_sum": Case(
        lambda layer: SingularSum(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * _refine(layer.size),
        bytes=lambda size, item: _weights_read(size, item) + 4 * size.numel,
        work=lambda size: (size.tasks + 2) * (EIGEN * size.small**3 + 4 * size.numel * size.small),
        computes="float64",
        peer=published.SINGULAR_SUM,
    ),
    "isotropic": Case(
        lambda layer: Isotropic(layer.base, layer.experts),
        flops=lambda layer: _refine(layer.size),
        bytes=lambda size, item: _weights_read(size, item) + 4 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 8 * size.numel * size.small,
        computes="float64",
        peer=published.ISOTROPIC,
    ),
}
