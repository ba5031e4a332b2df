"""Ops of the solvers: sums, Grams, systems and what solves them; beside the published forms, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.layers import TIME, Layer, Size
from benchmarks.ops.case import Case, Peer, weights_read
from benchmarks.peers import published
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

ADAM_STEPS = 5
LR = 1e-5
EIGEN = 90  # time of float64 eigenvectors on one thread, in n^3 operations at the rate of float32 products


def _floats(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    return layer.base.float(), [expert.float() for expert in layer.experts]


def _taus(layer: Layer) -> Tensor:
    base, experts = _floats(layer)
    return torch.stack([expert - base for expert in experts])


def _sum(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    return ((taus * taus.new_tensor(layer.shares)[:, None, None]).sum(dim=0),)


def _traces(layer: Layer) -> tuple[Tensor, ...]:
    return (torch.stack([torch.trace(tau.mT @ tau) for tau in _taus(layer)]),)


def _gram(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    grams = taus.mT @ taus
    return ((grams * taus.new_tensor(layer.shares)[:, None, None]).sum(dim=0),)


def _stack(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    Z = (taus * taus.new_tensor(layer.shares)[:, None, None].sqrt()).flatten(0, 1)
    return Z, Z @ Z.mT


def _equations(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    weights = taus.new_tensor(layer.shares)[:, None, None]
    grams = taus.mT @ taus
    A = (grams * weights).sum(dim=0)
    return A, (taus @ grams * weights).sum(dim=0) - layer.start @ A


def wudi_adam(steps: int, lr: float) -> Peer:
    """The released loop, from the weights: autograd on the loss of every task, torch.optim.Adam."""

    def results(layer: Layer) -> tuple[Tensor, ...]:
        return (published.wudi_autograd(*_floats(layer), steps, lr) - layer.start,)

    # Adam divides a gradient by its size: where that is nearly 0, rounding decides the direction of the step.
    return Peer(
        "WUDI's released loop",
        results,
        work=lambda size: 4 * size.tasks * size.d_out**2 * size.d_in * steps,
        memory=lambda size: 12 * size.tasks * (size.d_out**2 + size.numel),
        tolerance=2e-3,
    )


RANK = 48  # of three adapters of the usual size


def adapter(layer: Layer) -> tuple[Tensor, Tensor]:
    """Factors of float32, of a product that is small beside the weights."""
    rank, generator = _rank(layer.size), torch.Generator().manual_seed(0)
    left = torch.randn(layer.size.d_out, rank, generator=generator)
    right = torch.randn(rank, layer.size.d_in, generator=generator)
    return left.mul_(1e-3).to(layer.base.device), right.mul_(rank**-0.5).to(layer.base.device)


def _rank(size: Size) -> int:
    return min(RANK, size.d_out, size.d_in)


def low_rank(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Q, C and P of the layer's system between some directions of its rows, rank by rank."""
    A, B = layer.equations
    Q, _ = torch.linalg.qr(_taus(layer)[0][: _rank(layer.size)].mT)
    return Q, Q.mT @ A @ Q, B @ Q


def _adam_on_whole_matrices(layer: Layer) -> tuple[Tensor, ...]:
    Q, C, P = low_rank(layer)
    return (WudiAdam(Q @ C @ Q.mT, P @ Q.mT, ADAM_STEPS, LR).reference(),)


ADAM_ON_WHOLE_MATRICES = Peer(
    "the same steps on whole matrices",
    _adam_on_whole_matrices,
    work=lambda size: 2 * ADAM_STEPS * size.product,
    memory=lambda size: 4 * (size.d_in**2 + 6 * size.numel),
    tolerance=2e-3,
)


def by_eigenvectors(time: float) -> Peer:
    """SWUDI's exponential filter, from the weights, by eigenvectors in float32."""

    def results(layer: Layer) -> tuple[Tensor, ...]:
        return (published.swudi_eigh(*_floats(layer), time) - layer.start,)

    return Peer(
        "SWUDI by eigenvectors",
        results,
        work=lambda size: 2 * size.tasks * size.product + 30 * size.d_in**3,
        memory=lambda size: 4 * (2 * size.tasks + 4) * (size.d_in**2 + size.numel),
        tolerance=5e-3,
    )


def _inverse(layer: Layer) -> tuple[Tensor, ...]:
    A, B = layer.equations
    return (B @ torch.linalg.inv(layer.regular + A.mean(dim=0, keepdim=True)),)


def _svd(layer: Layer) -> tuple[Tensor, ...]:
    X, k = layer.equations[1], layer.size.k
    U, s, Vh = torch.linalg.svd(layer.start + X, full_matrices=False)
    return (X + s[:k].mean() * U[:, :k] @ Vh[:k],)


def _polar(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def _orthogonal_sum(layer: Layer) -> tuple[Tensor, ...]:
    base, experts = _floats(layer)
    k = layer.size.small // len(experts)
    parts = [torch.linalg.svd(expert - base, full_matrices=False) for expert in experts]
    U, s, Vh = (
        torch.cat([p[0][:, :k] for p in parts], 1),
        torch.cat([p[1][:k] for p in parts]),
        [p[2][:k] for p in parts],
    )
    return (_polar(U) * s @ _polar(torch.cat(Vh)),)


def _isotropic(layer: Layer) -> tuple[Tensor, ...]:
    base, experts = _floats(layer)
    U, s, Vh = torch.linalg.svd(sum((expert - base for expert in experts), torch.zeros_like(base)), full_matrices=False)
    return (s.mean() * U @ Vh,)


TASK_STATS = Peer(
    "ACE's traces of products",
    _traces,
    work=lambda size: size.tasks * size.product,
    memory=lambda size: 4 * (2 * size.tasks * size.numel + size.d_in**2),
)
TASK_SUM = Peer(
    "stacked deltas",
    _sum,
    work=lambda size: 600 * size.tasks * size.numel,
    memory=lambda size: 8 * (size.tasks + 1) * size.numel,
)
TASK_GRAM = Peer(
    "a Gram for each task",
    _gram,
    work=lambda size: size.tasks * size.product,
    memory=lambda size: 4 * size.tasks * (2 * size.numel + 2 * size.d_in**2),
)
STACKED_GRAM = Peer(
    "task vectors concatenated",
    _stack,
    work=lambda size: 2 * (size.tasks * size.d_out) ** 2 * size.d_in,
    memory=lambda size: 4 * (2 * size.tasks * size.numel + (size.tasks * size.d_out) ** 2),
    tolerance=1e-4,
)
NORMAL_EQUATIONS = Peer(
    "a Gram for each task",
    _equations,
    work=lambda size: 2 * size.tasks * size.product,
    memory=lambda size: 4 * size.tasks * (4 * size.numel + 2 * size.d_in**2),
    tolerance=1e-3,
)
SPD_SOLVE = Peer(
    "ACE's inverse",
    _inverse,
    work=lambda size: size.product + 5 * size.d_in**3,
    memory=lambda size: 16 * size.d_in**2,
    tolerance=1e-3,
)
SINGULAR_SUM = Peer(
    "TSV-M's singular value decompositions",
    _orthogonal_sum,
    work=lambda size: 7 * (size.tasks + 2) * (4 * size.numel * size.small + 22 * size.small**3),
    memory=lambda size: 4 * (size.tasks + 8) * (size.numel + size.small**2),
    tolerance=2e-2,
)
ISOTROPIC = Peer(
    "Iso-C's singular value decomposition",
    _isotropic,
    work=lambda size: 7 * (4 * size.numel * size.small + 22 * size.small**3),
    memory=lambda size: 4 * (size.tasks + 6) * (size.numel + size.small**2),
    tolerance=2e-2,
)
SPECTRAL_REFINE = Peer(
    "ACE's full SVD",
    _svd,
    work=lambda size: 7 * (4 * size.numel * size.small + 22 * size.small**3),
    memory=lambda size: 16 * (size.numel + size.small**2),
    tolerance=5e-3,
)


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
        flops=lambda layer: 4 * ADAM_STEPS * layer.size.numel * _rank(layer.size),
        bytes=lambda size, item: 4 * (size.numel + (size.d_in + size.d_out) * _rank(size)),
        work=lambda size: ADAM_STEPS * size.numel * (8 * _rank(size) + 200),
        computes="float32",
        settings=f"{ADAM_STEPS} steps, rank {RANK}",
        peer=ADAM_ON_WHOLE_MATRICES,
    ),
    "low_rank_sum": Case(
        lambda layer: LowRankSum(layer.base, *adapter(layer)),
        flops=lambda layer: 2 * layer.size.numel * _rank(layer.size),
        bytes=lambda size, item: 2 * item * size.numel + 4 * (size.d_in + size.d_out) * _rank(size),
        work=lambda size: size.numel * (2 * _rank(size) + 20),
        computes="float32",
        settings=f"rank {RANK}",
        peer=Peer(
            "PEFT's merge",
            lambda layer: (layer.base + torch.mm(*adapter(layer)),),
            work=lambda size: size.numel * (2 * _rank(size) + 20),
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
