"""What ops of the solvers are compared with: the published forms in plain PyTorch, and the inputs that they need."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.layers import Layer, Size
from benchmarks.ops.case import Peer
from benchmarks.peers import published
from pymerge.ops.wudi_adam import WudiAdam

ADAM_STEPS = 5
LR = 1e-5


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
    rank, generator = adapter_rank(layer.size), torch.Generator().manual_seed(0)
    left = torch.randn(layer.size.d_out, rank, generator=generator)
    right = torch.randn(rank, layer.size.d_in, generator=generator)
    return left.mul_(1e-3).to(layer.base.device), right.mul_(rank**-0.5).to(layer.base.device)


def adapter_rank(size: Size) -> int:
    return min(RANK, size.d_out, size.d_in)


def low_rank(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Q, C and P of the layer's system between some directions of its rows, rank by rank."""
    A, B = layer.equations
    Q, _ = torch.linalg.qr(_taus(layer)[0][: adapter_rank(layer.size)].mT)
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
