"""Ops of the solvers: sums, Grams, systems and what solves them; beside the published forms, in plain PyTorch."""

from __future__ import annotations

import torch

from benchmarks.harness.layers import TIME, Size
from benchmarks.ops.case import Case, Peer, weights_read
from benchmarks.ops.dense_peers import (
    ADAM_ON_WHOLE_MATRICES,
    ADAM_STEPS,
    ISOTROPIC,
    LR,
    NORMAL_EQUATIONS,
    RANK,
    SINGULAR_SUM,
    SPD_SOLVE,
    SPECTRAL_REFINE,
    STACKED_GRAM,
    TASK_GRAM,
    TASK_STATS,
    TASK_SUM,
    adapter,
    adapter_rank,
    by_eigenvectors,
    low_rank,
    wudi_adam,
)
from pymerge.ops.gradient_flow import GradientFlow, schedule
from pymerge.ops.isotropic import Isotropic
from pymerge.ops.low_rank_adam import LowRankAdam
from pymerge.ops.low_rank_sum import LowRankSum
from pymerge.ops.normal_equations import NormalEquations, outputs_first
from pymerge.ops.singular_sum import SingularSum
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.spectral_filter import SpectralFilter
from pymerge.ops.spectral_refine import SpectralRefine
from pymerge.ops.stacked_gram import StackedGram
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.task_sum import TaskSum
from pymerge.ops.wudi_adam import WudiAdam

EIGEN = 90  # time of float64 eigenvectors on one thread, in n^3 operations at the rate of float32 products


def _gram_flops(size: Size) -> int:
    return size.tasks * size.product // 2


def _equations_flops(size: Size) -> int:
    first = outputs_first(size.d_out, size.d_in)
    each = 4 * size.d_out**2 * size.d_in if first else size.product
    return _gram_flops(size) + size.tasks * each


def _stack_flops(size: Size) -> int:
    """A symmetric product of all rows: half of it."""
    return (size.tasks * size.d_out) ** 2 * size.d_in


def _refine_flops(size: Size) -> float:
    """A symmetric Gram, its eigenvectors (reduction and back-transformation, 10/3 n^3), and two products."""
    large = size.numel // size.small
    return large * size.small**2 + 10 / 3 * size.small**3 + 4 * size.numel * size.k


CASES = {
    "task_stats": Case(
        lambda layer: TaskStats(layer.base, layer.experts),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item,
        work=lambda size: 2000 * size.tasks * size.numel,
        peer=TASK_STATS,
    ),
    "task_sum": Case(
        lambda layer: TaskSum(layer.base, layer.experts, layer.shares),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + 4 * size.numel,
        work=lambda size: 300 * size.tasks * size.numel,
        peer=TASK_SUM,
    ),
    "task_gram": Case(
        lambda layer: TaskGram(layer.base, layer.experts, layer.shares),
        flops=lambda layer: _gram_flops(layer.size),
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + 4 * size.d_in**2,
        work=lambda size: 2 * _gram_flops(size),
        peer=TASK_GRAM,
    ),
    "stacked_gram": Case(
        lambda layer: StackedGram(layer.base, layer.experts, layer.shares),
        flops=lambda layer: _stack_flops(layer.size),
        bytes=lambda size, item: (
            (size.tasks + 1) * size.numel * item + 4 * (size.tasks * size.numel + (size.tasks * size.d_out) ** 2)
        ),
        work=lambda size: 2 * _stack_flops(size),
        peer=STACKED_GRAM,
    ),
    "normal_equations": Case(
        lambda layer: NormalEquations(layer.base, layer.experts, layer.shares, origin=layer.start),
        flops=lambda layer: _equations_flops(layer.size),
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item + size.system,
        work=lambda size: 2 * _equations_flops(size),
        peer=NORMAL_EQUATIONS,
    ),
    "wudi_adam": Case(
        lambda layer: WudiAdam(*layer.equations, ADAM_STEPS, LR),
        flops=lambda layer: ADAM_STEPS * layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: 2 * ADAM_STEPS * size.product,
        computes="float32",
        settings=f"{ADAM_STEPS} steps",
        peer=wudi_adam(ADAM_STEPS, LR),
    ),
    "low_rank_adam": Case(
        lambda layer: LowRankAdam(*low_rank(layer), ADAM_STEPS, LR),
        flops=lambda layer: 4 * ADAM_STEPS * layer.size.numel * adapter_rank(layer.size),
        bytes=lambda size, item: 4 * (size.numel + (size.d_in + size.d_out) * adapter_rank(size)),
        work=lambda size: ADAM_STEPS * size.numel * (8 * adapter_rank(size) + 200),
        computes="float32",
        settings=f"{ADAM_STEPS} steps, rank {RANK}",
        peer=ADAM_ON_WHOLE_MATRICES,
    ),
    "low_rank_sum": Case(
        lambda layer: LowRankSum(layer.base, *adapter(layer)),
        flops=lambda layer: 2 * layer.size.numel * adapter_rank(layer.size),
        bytes=lambda size, item: 2 * item * size.numel + 4 * (size.d_in + size.d_out) * adapter_rank(size),
        work=lambda size: size.numel * (2 * adapter_rank(size) + 20),
        computes="float32",
        settings=f"rank {RANK}",
        peer=Peer(
            "PEFT's merge",
            lambda layer: (layer.base + torch.mm(*adapter(layer)),),
            work=lambda size: size.numel * (2 * adapter_rank(size) + 20),
            memory=lambda size: 12 * size.numel,
            tolerance=1e-2,  # the product is rounded to the weights' dtype there, or the sum to float32
        ),
    ),
    "gradient_flow": Case(
        lambda layer: GradientFlow(*layer.equations, TIME),
        flops=lambda layer: layer.flow_flops,
        bytes=lambda size, item: size.system,
        # The largest eigenvalue of A is at most its trace, T.
        work=lambda size: 2 * schedule(size.d_out, size.d_in, size.tasks * TIME).flops,
        computes="float32",
        settings=f"t={TIME:g}",
        peer=by_eigenvectors(TIME),
    ),
    "spectral_filter": Case(
        lambda layer: SpectralFilter(*layer.equations, TIME, 1.0),
        flops=lambda layer: 10 / 3 * layer.size.d_in**3 + 2 * layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: EIGEN * size.d_in**3 / 2 + 2 * size.product,
        computes="float32",
        settings=f"t={TIME:g}, all directions",
        peer=by_eigenvectors(TIME),
    ),
    "spd_solve": Case(
        lambda layer: SpdSolve(layer.regular, layer.equations[1], layer.equations[0].mean(0)),
        flops=lambda layer: layer.size.d_in**3 / 3 + layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: 4 * (size.d_in**3 / 3 + size.product),
        computes="float32",
        peer=SPD_SOLVE,
    ),
    "spectral_refine": Case(
        lambda layer: SpectralRefine(layer.equations[1], layer.start, layer.size.k),
        flops=lambda layer: _refine_flops(layer.size),
        bytes=lambda size, item: 12 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 8 * size.numel * size.small,
        computes="float64",
        peer=SPECTRAL_REFINE,
    ),
    "singular_sum": Case(
        lambda layer: SingularSum(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * _refine_flops(layer.size),
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: (size.tasks + 2) * (EIGEN * size.small**3 + 4 * size.numel * size.small),
        computes="float64",
        peer=SINGULAR_SUM,
    ),
    "isotropic": Case(
        lambda layer: Isotropic(layer.base, layer.experts),
        flops=lambda layer: _refine_flops(layer.size),
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 8 * size.numel * size.small,
        computes="float64",
        peer=ISOTROPIC,
    ),
}
