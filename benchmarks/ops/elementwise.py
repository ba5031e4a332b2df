"""Ops that go element by element, or row by row: combine, mergekit's methods; with formulas on whole tensors beside."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness.layers import Layer, Size
from benchmarks.ops.case import Case, Peer, weights_read
from pymerge.ops.arcee_fusion import ArceeFusion
from pymerge.ops.combine import Combine
from pymerge.ops.combine_vectors import CombineVectors
from pymerge.ops.importance import Importance
from pymerge.ops.nearswap import Nearswap
from pymerge.ops.ram import Ram
from pymerge.ops.ram_counts import RamCounts
from pymerge.ops.row_divergence import RowDivergence
from pymerge.ops.sce import Sce
from pymerge.ops.sce_energies import SceEnergies
from pymerge.ops.sce_spread import SceSpread
from pymerge.ops.task_dots import TaskDots

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


def _combine(layer: Layer) -> tuple[Tensor, ...]:
    deltas = torch.stack([expert - layer.base for expert in layer.experts])
    weights = torch.full((len(deltas), 1, 1), 0.3, dtype=deltas.dtype, device=deltas.device)
    return (layer.base + (deltas * weights).sum(dim=0),)


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


# Half of bfloat16's digits are lost in the deltas; the reference rounds once, at the end.
COMBINE = Peer(
    "mergekit's stacked deltas",
    _combine,
    work=lambda size: 600 * size.tasks * size.numel,
    memory=lambda size: 8 * (size.tasks + 1) * size.numel,
    tolerance=1e-2,
)
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


CASES = {
    "combine": Case(
        lambda layer: Combine(layer.base, layer.experts, [0.3] * layer.size.tasks),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 300 * size.tasks * size.numel,
        peer=COMBINE,
    ),
    "combine_vectors": Case(
        lambda layer: CombineVectors(layer.base, layer.experts, row_weights(layer), "rows"),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 600 * size.tasks * size.numel,
        settings="by rows",
        peer=COMBINE_VECTORS,
    ),
    "task_dots": Case(
        lambda layer: TaskDots(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * (layer.size.tasks + 2) * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 1) * size.numel * item,
        work=lambda size: 300 * size.tasks * (size.tasks + 1) * size.numel,
        peer=TASK_DOTS,
    ),
    "nearswap": Case(
        lambda layer: Nearswap(layer.base, layer.experts[0], T),
        flops=lambda layer: 8 * layer.size.numel,
        bytes=lambda size, item: 3 * size.numel * item,
        work=lambda size: 600 * size.numel,
        peer=NEARSWAP,
    ),
    "ram": Case(
        lambda layer: Ram(layer.base, layer.experts, EPSILON),
        flops=lambda layer: 4 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=RAM,
    ),
    "ram_counts": Case(
        lambda layer: RamCounts(layer.base, layer.experts, EPSILON),
        flops=lambda layer: 4 * layer.size.tasks * layer.size.numel,
        bytes=weights_read,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=RAM_COUNTS,
    ),
    "sce_spread": Case(
        lambda layer: SceSpread(layer.base, layer.experts),
        flops=lambda layer: 5 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=SCE_SPREAD,
    ),
    "sce_energies": Case(
        lambda layer: SceEnergies(layer.base, layer.experts),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=weights_read,
        work=lambda size: 600 * size.tasks * size.numel,
        peer=SCE_ENERGIES,
    ),
    "sce": Case(
        lambda layer: Sce(layer.base, layer.experts, layer.shares),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (size.tasks + 2) * size.numel * item,
        work=lambda size: 1000 * size.tasks * size.numel,
        peer=SCE,
    ),
    "row_divergence": Case(
        lambda layer: RowDivergence(layer.base, layer.experts[0]),
        flops=lambda layer: 40 * layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item,
        work=lambda size: 2000 * size.numel,
        peer=ROW_DIVERGENCE,
    ),
    "importance": Case(
        lambda layer: Importance(layer.base, layer.experts[0], row_divergence(layer)),
        flops=lambda layer: 2 * layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item + 4 * size.numel,
        work=lambda size: 600 * size.numel,
        peer=IMPORTANCE,
    ),
    "arcee_fusion": Case(
        lambda layer: ArceeFusion(
            layer.base,
            layer.experts[0],
            row_divergence(layer),
            least_important(layer),
        ),
        flops=lambda layer: 4 * layer.size.numel,
        bytes=lambda size, item: 3 * size.numel * item,
        work=lambda size: 1000 * size.numel,
        peer=ARCEE_FUSION,
    ),
}
