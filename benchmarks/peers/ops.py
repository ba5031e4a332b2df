"""The published form of what each op computes, in plain PyTorch, on the inputs of ops/cases.py."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.layers import Layer
from benchmarks.peers import published
from benchmarks.peers.peer import Peer


def _floats(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    return layer.base.float(), [expert.float() for expert in layer.experts]


def _taus(layer: Layer) -> Tensor:
    base, experts = _floats(layer)
    return torch.stack([expert - base for expert in experts])


def _combine(layer: Layer) -> tuple[Tensor, ...]:
    deltas = torch.stack([expert - layer.base for expert in layer.experts])
    weights = torch.full((len(deltas), 1, 1), 0.3, dtype=deltas.dtype, device=deltas.device)
    return (layer.base + (deltas * weights).sum(dim=0),)


def _sum(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    return ((taus * taus.new_tensor(layer.shares)[:, None, None]).sum(dim=0),)


def _routed(layer: Layer) -> tuple[Tensor, ...]:
    x, gates, weight, tasks = layer.routed
    outputs = []
    for sample, shares in zip(x, gates, strict=True):
        merged = weight.clone()
        for share, tau in zip(shares, tasks.values, strict=True):
            merged = merged + share * tau.float()
        outputs.append(sample @ merged.mT)
    return (torch.stack(outputs),)


def _mixed(layer: Layer) -> tuple[Tensor, ...]:
    weight, tasks, gates = layer.mixed
    return (torch.stack([weight + (shares[:, None, None] * tasks.values).sum(0) for shares in gates]),)


def _traces(layer: Layer) -> tuple[Tensor, ...]:
    return (torch.stack([torch.trace(tau.mT @ tau) for tau in _taus(layer)]),)


def _gram(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    grams = taus.mT @ taus
    return ((grams * taus.new_tensor(layer.shares)[:, None, None]).sum(dim=0),)


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


# Half of bfloat16's digits are lost in the deltas; the reference rounds once, at the end.
COMBINE = Peer(
    "mergekit's stacked deltas",
    _combine,
    work=lambda size: 600 * size.tasks * size.numel,
    memory=lambda size: 8 * (size.tasks + 1) * size.numel,
    tolerance=1e-2,
)
TASK_STATS = Peer(
    "ACE's traces of products",
    _traces,
    work=lambda size: size.tasks * size.product,
    memory=lambda size: 4 * (2 * size.tasks * size.numel + size.d_in**2),
)
ROUTED_LINEAR = Peer(
    "WEMoE's weights merged task by task for each sample",
    _routed,
    work=lambda size: 2000 * size.tasks * size.numel,
    memory=lambda size: 16 * size.numel,
)
MIX_WEIGHTS = Peer(
    "WEMoE's sum of stacked task vectors for each sample",
    _mixed,
    work=lambda size: 2000 * size.tasks * size.numel,
    memory=lambda size: 4 * (2 * size.tasks + 4) * size.numel,
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
