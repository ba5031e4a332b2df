"""mergekit's geometric and elementwise methods as formulas on whole float32 tensors, for op_cases.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from op_peers import Peer
from torch import Tensor

if TYPE_CHECKING:
    from op_layers import Layer, Size

T = 5e-4  # of nearswap
EPSILON = 1e-4  # of ram
SHARE = 0.5  # of sce


def _inputs(layer: Layer) -> tuple[Tensor, Tensor]:
    """W_0 and all tau_t, float32."""
    base = layer.base.float()
    return base, torch.stack([expert.float() - base for expert in layer.experts])


def _dots(layer: Layer) -> tuple[Tensor, ...]:
    taus = _inputs(layer)[1].double().flatten(1)
    return ((taus @ taus.mT)[None],)


def row_weights(layer: Layer) -> Tensor:
    """Weights of each row and task."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(layer.size.d_out, layer.size.tasks, generator=generator).to(layer.base.device)


def _combine_vectors(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    return ((base + (row_weights(layer).T[:, :, None] * taus).sum(0)).to(layer.base.dtype),)


def _nearswap(layer: Layer) -> tuple[Tensor, ...]:
    base, model = layer.base.float(), layer.experts[0].float()
    share = (T / (model - base).abs().clamp(min=1e-6)).clamp(max=1.0)
    return ((share * model + (1.0 - share) * base).to(layer.base.dtype),)


def _ram(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    active = taus.abs() > EPSILON
    return ((base + (taus * active).sum(0) / active.sum(0).clamp(min=1)).to(layer.base.dtype),)


def _sce(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    spread = taus.var(0, unbiased=False).flatten()
    selected = torch.zeros_like(spread)
    selected[spread.topk(int(torch.count_nonzero(spread) * SHARE)).indices] = 1.0
    taus = taus * selected.view(base.shape)
    energies = taus.square().flatten(1).mean(1)
    kept = (torch.sign(taus) == torch.where(taus.sum(0) >= 0, 1.0, -1.0)) * (energies / energies.sum())[:, None, None]
    return ((base + (taus * kept).sum(0) / kept.sum(0).clamp(min=1e-9)).to(layer.base.dtype),)


def _arcee_fusion(layer: Layer) -> tuple[Tensor, ...]:
    base, model = layer.base.double(), layer.experts[0].double()
    p, q = torch.softmax(model, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    scores = ((model - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)).float()
    ordered = scores.flatten().sort().values
    low, middle, high = (ordered[(len(ordered) - 1) * quarter // 4] for quarter in (1, 2, 3))
    return (torch.where(scores >= middle + 1.5 * (high - low), model, base).to(layer.base.dtype),)


def _whole(size: Size) -> int:
    return 4 * (4 * size.tasks + 6) * size.numel


TASK_DOTS = Peer(
    "float64 product of all task vectors",
    _dots,
    work=lambda size: 2 * size.tasks**2 * size.numel + 100 * size.tasks * size.numel,
    memory=lambda size: 8 * (2 * size.tasks + 2) * size.numel,
)
COMBINE_VECTORS, NEARSWAP, RAM, SCE = (
    Peer(f"{name} on whole tensors", results, lambda size: 600 * size.tasks * size.numel, _whole, tolerance=4e-3)
    for name, results in (("sum", _combine_vectors), ("nearswap", _nearswap), ("ram", _ram), ("sce", _sce))
)
ARCEE_FUSION = Peer(
    "arcee_fusion by sorting",
    _arcee_fusion,
    work=lambda size: 10_000 * size.numel,
    memory=lambda size: 80 * size.numel,
    tolerance=4e-3,
)
