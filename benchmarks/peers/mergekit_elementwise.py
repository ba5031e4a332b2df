"""mergekit's geometric and elementwise methods as formulas on whole float32 tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness.layers import Layer, Size
from benchmarks.peers.peer import Peer

T = 5e-4  # of nearswap
EPSILON = 1e-4  # of ram


def _inputs(layer: Layer) -> tuple[Tensor, Tensor]:
    """W_0 and all tau_t, float32."""
    base = layer.base.float()
    return base, torch.stack([expert.float() - base for expert in layer.experts])


def _dots(layer: Layer) -> tuple[Tensor, ...]:
    taus = _inputs(layer)[1].double().flatten(1)
    return ((taus @ taus.mT)[None],)


def row_weights(layer: Layer) -> NDArray[np.float64]:
    """Weights of each row and task, [d_out, T]."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(layer.size.d_out, layer.size.tasks, generator=generator).double().numpy()


def _combine_vectors(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    weights = torch.from_numpy(row_weights(layer)).to(base)
    return ((base + (weights.T[:, :, None] * taus).sum(0)).to(layer.base.dtype),)


def _nearswap(layer: Layer) -> tuple[Tensor, ...]:
    base, model = layer.base.float(), layer.experts[0].float()
    share = (T / (model - base).abs().clamp(min=1e-6)).clamp(max=1.0)
    return ((share * model + (1.0 - share) * base).to(layer.base.dtype),)


def _ram(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    active = taus.abs() > EPSILON
    return ((base + (taus * active).sum(0) / active.sum(0).clamp(min=1)).to(layer.base.dtype),)


def _ram_counts(layer: Layer) -> tuple[Tensor, ...]:
    active = _inputs(layer)[1].abs() > EPSILON
    count = active.sum(0)
    return (torch.stack([(active & (count == 1)).flatten(1).sum(1), (active & (count > 1)).flatten(1).sum(1)], dim=1),)


def _sce_spread(layer: Layer) -> tuple[Tensor, ...]:
    return (_inputs(layer)[1].var(0, unbiased=False),)


def _sce_energies(layer: Layer) -> tuple[Tensor, ...]:
    return (_inputs(layer)[1].double().square().flatten(1).sum(1),)


def _sce(layer: Layer) -> tuple[Tensor, ...]:
    base, taus = _inputs(layer)
    weights = torch.tensor(layer.shares, device=base.device)[:, None, None]
    kept = (torch.sign(taus) == torch.where(taus.sum(0) >= 0, 1.0, -1.0)) * weights
    return ((base + (taus * kept).sum(0) / kept.sum(0).clamp(min=1e-9)).to(layer.base.dtype),)


def _divergence(layer: Layer) -> Tensor:
    p, q = (torch.softmax(tensor.double(), -1) + 1e-8 for tensor in (layer.experts[0], layer.base))
    return (p * (p / q).log()).sum(-1)


def row_divergence(layer: Layer) -> NDArray[np.float64]:
    """Divergence of the first expert's rows, [d_out]."""
    return _divergence(layer).cpu().numpy()


def _importance(layer: Layer) -> Tensor:
    base, model = layer.base.float(), layer.experts[0].float()
    return ((model - base).abs() * _divergence(layer)[:, None]).float()


def least_important(layer: Layer) -> float:
    """The threshold of arcee_fusion."""
    ordered = _importance(layer).flatten().sort().values
    low, middle, high = (ordered[(len(ordered) - 1) * quarter // 4] for quarter in (1, 2, 3))
    return float(middle + 1.5 * (high - low))


def _arcee_fusion(layer: Layer) -> tuple[Tensor, ...]:
    return (torch.where(_importance(layer) >= least_important(layer), layer.experts[0], layer.base),)


def _whole(size: Size) -> int:
    return 4 * (4 * size.tasks + 6) * size.numel


TASK_DOTS = Peer(
    "float64 product of all task vectors",
    _dots,
    work=lambda size: 2 * size.tasks**2 * size.numel + 100 * size.tasks * size.numel,
    memory=lambda size: 8 * (2 * size.tasks + 2) * size.numel,
)
COMBINE_VECTORS, NEARSWAP, RAM, RAM_COUNTS, SCE_SPREAD, SCE_ENERGIES, SCE = (
    Peer(f"{name} on whole tensors", results, lambda size: 600 * size.tasks * size.numel, _whole, tolerance=4e-3)
    for name, results in (
        ("sum", _combine_vectors),
        ("nearswap", _nearswap),
        ("ram", _ram),
        ("counts", _ram_counts),
        ("variance", _sce_spread),
        ("energies", _sce_energies),
        ("sce", _sce),
    )
)
ROW_DIVERGENCE, IMPORTANCE, ARCEE_FUSION = (
    Peer(f"{name} on whole tensors", results, lambda size: 4000 * size.numel, lambda size: 80 * size.numel, tolerance)
    for name, results, tolerance in (
        ("divergence", lambda layer: (_divergence(layer),), 1e-6),
        ("importance", lambda layer: (_importance(layer),), 1e-6),
        ("arcee_fusion", _arcee_fusion, 4e-3),
    )
)
