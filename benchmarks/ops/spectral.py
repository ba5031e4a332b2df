"""Ops on spectra of task vectors and of merged deltas, against the published forms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness.layers import DENSITY, Layer, Size
from benchmarks.ops.case import Case, Peer, weights_read
from benchmarks.ops.dense import EIGEN
from pymerge.ops.boost import Boost
from pymerge.ops.calibrate import Calibrate
from pymerge.ops.cover_sum import CoverSum
from pymerge.ops.doge import Doge
from pymerge.ops.flow_to_length import FlowToLength
from pymerge.ops.leading_part import LeadingPart
from pymerge.ops.pseudo_solve import PseudoSolve
from pymerge.ops.resmerge import Resmerge
from pymerge.ops.shrink import Shrink
from pymerge.ops.temper_spectrum import TemperSpectrum
from pymerge.ops.trimmed_equations import TrimmedEquations

CUTOFF = 1e-5
MU = 1e-3
DOGE_STEPS, DOGE_LR = 5, 1e-6
BETA = 0.3  # large, so that rounding is not raised
CREST = 1.75  # of TemperSpectrum
CORE_SHARE = 0.05  # of the small cores here, so that several entries are kept


def _taus(layer: Layer) -> list[Tensor]:
    base = layer.base.double()
    return [expert.double() - base for expert in layer.experts]


def _trimmed(layer: Layer) -> tuple[Tensor, ...]:
    size, taus = layer.size, _taus(layer)
    count = int(DENSITY * size.numel)
    A, B = taus[0].new_zeros(size.d_in, size.d_in), torch.zeros_like(taus[0])
    for tau in taus:
        mask = torch.zeros(size.numel, dtype=torch.bool, device=tau.device)
        mask[tau.abs().flatten().sort(descending=True, stable=True).indices[:count]] = True
        kept = tau * mask.view_as(tau)
        A += kept.mT @ kept
        B += tau @ kept.mT @ kept
    return A, B


def _pinv(layer: Layer) -> tuple[Tensor, ...]:
    A, B = layer.equations
    return (B @ torch.linalg.pinv(A, rtol=CUTOFF),)


def _polar(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def _covered(layer: Layer) -> tuple[Tensor, ...]:
    taus, small = _taus(layer), layer.size.small
    k = small // len(taus)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in taus]
    U, V = _polar(torch.cat([p[0][:, :k] for p in parts], 1)), _polar(torch.cat([p[2][:k] for p in parts])).mT
    cores = torch.stack([U.mT @ (p[0][:, :k] * p[1][:k]) @ p[2][:k] @ V for p in parts])
    flat = cores.abs().flatten(1)
    most = min(flat.shape[1], max(1, int(CORE_SHARE * small**2)))
    cores = cores * (cores.abs() >= flat.topk(most).values[:, -1, None, None])
    agrees = (cores.sign() == cores.sum(0).sign()) & (cores.sum(0) != 0)
    merged = (cores * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    blocks = torch.block_diag(*[merged.new_ones(k, k)] * len(taus))
    return (U @ (merged * blocks) @ V.mT,)


def _calibrated(layer: Layer) -> tuple[Tensor, ...]:
    taus = torch.stack(_taus(layer))
    U, s, Vh = torch.linalg.svd(taus.sum(0), full_matrices=False)
    responses = U.mT @ taus
    parts = (s[:, None] * Vh * responses).sum(-1) / responses.square().sum(-1).clamp(min=1e-12)
    return (U * (s * len(taus) / parts.clamp(min=1.0).sum(0)) @ Vh,)


def _tempered(layer: Layer) -> tuple[Tensor, ...]:
    taus = torch.stack(_taus(layer))
    U, s, Vh = torch.linalg.svd(taus.sum(0), full_matrices=False)
    responses = U.mT @ taus
    energies, asked = responses.square().sum(-1).sum(0), responses.sum(0)
    s = s / ((s[:, None] * Vh * asked).sum(-1) / energies).clamp(min=1 / len(taus))
    agreed = (asked.square().sum(-1) / energies - 1) / (len(taus) - 1)
    crest = CREST * s.square().mean().sqrt()
    return (U * torch.where(s > crest, crest + (s - crest) * agreed.clamp(min=0), s) @ Vh,)


def _boosted(layer: Layer) -> tuple[Tensor, ...]:
    U, s, Vh = torch.linalg.svd(sum(_taus(layer)), full_matrices=False)
    cut = int((s.cumsum(0) / s.sum() >= BETA).int().argmax())
    return (U * s.clamp(min=float(s[cut])) @ Vh,)


def _leading(layer: Layer) -> tuple[Tensor, ...]:
    U, s, Vh = torch.linalg.svd(sum(_taus(layer)), full_matrices=False)
    return (U[:, : layer.size.k] * s[: layer.size.k] @ Vh[: layer.size.k],)


def _thresholded(layer: Layer) -> tuple[Tensor, ...]:
    U, s, Vh = torch.linalg.svd(sum(_taus(layer)), full_matrices=False)
    return (U * (s - MU).clamp(min=0) @ Vh,)


def _residuals(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    heads = []
    for tau in taus:
        U, s, Vh = torch.linalg.svd(tau, full_matrices=False)
        heads.append(s[0] * torch.outer(U[:, 0], Vh[0]))
    rest = [tau - head for tau, head in zip(taus, heads, strict=True)]
    units = torch.stack([R / (R.norm() + 1e-8) for R in rest]).flatten(1)
    total = units.sum(0)
    q = total / total.norm()
    c = float((units @ q).mean().clamp(0, 1))
    A = torch.stack(rest).mean(0)
    pairs = torch.triu_indices(len(taus), len(taus), 1)
    if c > len(taus) ** -0.5:
        alike = float((units @ units.mT)[pairs[0], pairs[1]].mean())
        beta = 1.0 - 0.3 * ((alike + 1) / 2 + (c + 1) / 2) / 2
        A = q.view_as(A) * c**beta * torch.stack([R.norm() for R in rest]).mean()
    unit_heads = torch.stack([head / head.norm() for head in heads]).flatten(1)
    common = (unit_heads @ unit_heads.mT)[pairs[0], pairs[1]].clamp(min=0).mean()
    mean = torch.stack(heads).mean(0)
    return (A + mean / mean.norm() * 0.2 * common * A.norm(),)


def _descended(layer: Layer) -> tuple[Tensor, ...]:
    taus = torch.stack(_taus(layer))
    lengths = 0.07 / taus.flatten(1).norm(dim=1)
    k = layer.size.small // len(taus)
    parts = torch.cat([torch.linalg.svd(tau, full_matrices=False)[0][:, :k] for tau in taus], 1)
    Q = torch.linalg.svd(parts, full_matrices=False)[0][:, : layer.size.small // 6]
    D = torch.zeros_like(taus[0], requires_grad=True)
    adam = torch.optim.Adam([D], lr=DOGE_LR)
    for _ in range(DOGE_STEPS):
        adam.zero_grad()
        total = (lengths[:, None, None] * (taus + D)).sum(0)
        (taus * (taus - total)).sum(2).square().sum().backward()
        assert D.grad is not None
        D.grad.sub_(Q @ (Q.mT @ D.grad))
        adam.step()
    return ((lengths[:, None, None] * (taus + D.detach())).sum(0),)


def _lengthened(layer: Layer) -> tuple[Tensor, ...]:
    taus = _taus(layer)
    norms = torch.stack([tau.square().sum() for tau in taus])
    A = torch.stack([tau.mT @ tau / n**2 for tau, n in zip(taus, norms, strict=True)]).sum(0)
    B = torch.stack([tau @ (tau.mT @ tau) / n**2 for tau, n in zip(taus, norms, strict=True)]).sum(0)
    mean = torch.stack(taus).mean(0)
    values, V = torch.linalg.eigh(A)
    values = values.clamp(min=1e-14 * values[-1])
    start, residual, low, high = mean @ V, (B - mean @ A) @ V, -6.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        X = start + residual * -torch.expm1(-values * 10**middle / values[-1]) / values
        low, high = (middle, high) if X.norm() < norms.mean().sqrt() else (low, middle)
    return (X @ V.mT,)


def _svd_work(size: Size, count: int) -> float:
    return 7 * count * (4 * size.numel * size.small + 22 * size.small**3)


def _matrices(size: Size) -> int:
    """Bytes of a few matrices of a layer for each task, in float64."""
    return 8 * (size.tasks + 8) * (size.numel + size.small**2)


CASES: Mapping[str, Case] = {
    "trimmed_equations": Case(
        lambda layer: TrimmedEquations(layer.base, layer.experts, layer.thresholds),
        flops=lambda layer: layer.size.tasks * 1.5 * layer.size.product,
        bytes=lambda size, item: weights_read(size, item) + 2 * size.system,
        work=lambda size: 4 * size.tasks * size.product,
        computes="float64",
        peer=Peer(
            "TACT's masks by a sort",
            _trimmed,
            work=lambda size: 4 * size.tasks * size.product + 2000 * size.tasks * size.numel,
            memory=lambda size: 8 * (size.tasks + 6) * size.numel + 16 * size.d_in**2,
        ),
    ),
    "pseudo_solve": Case(
        lambda layer: PseudoSolve(*layer.equations, CUTOFF),
        flops=lambda layer: 10 / 3 * layer.size.d_in**3 + 2 * layer.size.product,
        bytes=lambda size, item: size.system,
        work=lambda size: EIGEN * size.d_in**3 / 2 + 2 * size.product,
        computes="float32",
        settings=f"cutoff {CUTOFF:g}",
        peer=Peer(
            "torch.linalg.pinv",
            _pinv,
            work=lambda size: 200 * size.d_in**3 + size.product,
            memory=lambda size: 24 * size.d_in**2,
            tolerance=2e-2,
        ),
    ),
    "calibrate": Case(
        lambda layer: Calibrate(sum(_taus(layer)), layer.base, layer.experts),
        flops=lambda layer: (layer.size.tasks + 4) * 2 * layer.size.small * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 16 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 2 * (size.tasks + 2) * 2 * size.numel * size.small,
        computes="float64",
        peer=Peer(
            "SVC's singular value decomposition",
            _calibrated,
            work=lambda size: _svd_work(size, 1) + 4 * size.tasks * size.numel * size.small,
            memory=_matrices,
        ),
    ),
    "temper_spectrum": Case(
        lambda layer: TemperSpectrum(sum(_taus(layer)), layer.base, layer.experts, CREST),
        flops=lambda layer: (layer.size.tasks + 4) * 2 * layer.size.small * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 16 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 2 * (size.tasks + 2) * 2 * size.numel * size.small,
        computes="float64",
        settings=f"below {CREST:g} root mean squares",
        peer=Peer(
            "a singular value decomposition",
            _tempered,
            work=lambda size: _svd_work(size, 1) + 4 * size.tasks * size.numel * size.small,
            memory=_matrices,
        ),
    ),
    "flow_to_length": Case(
        lambda layer: FlowToLength(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * layer.size.product,
        bytes=lambda size, item: weights_read(size, item) + 8 * size.numel,
        work=lambda size: EIGEN * size.d_in**3 + 4 * size.tasks * size.product,
        computes="float64",
        peer=Peer(
            "both matrices and all eigenvectors of one",
            _lengthened,
            work=lambda size: EIGEN * size.d_in**3 + 4 * size.tasks * size.product,
            memory=lambda size: _matrices(size) + 8 * (2 * size.tasks + 6) * size.d_in**2,
        ),
    ),
    "boost": Case(
        lambda layer: Boost(sum(_taus(layer)), BETA),
        flops=lambda layer: 8 * layer.size.small * layer.size.numel,
        bytes=lambda size, item: 16 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 4 * size.numel * size.small,
        computes="float64",
        settings=f"beta {BETA:g}",
        peer=Peer(
            "Subspace-Boosting's singular value decomposition",
            _boosted,
            work=lambda size: _svd_work(size, 1),
            memory=_matrices,
        ),
    ),
    "leading_part": Case(
        lambda layer: LeadingPart(sum(_taus(layer)), layer.size.k),
        flops=lambda layer: 4 * (layer.size.small + layer.size.k) * layer.size.numel,
        bytes=lambda size, item: 16 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 4 * size.numel * size.small,
        computes="float64",
        settings="3 directions of 10",
        peer=Peer(
            "a truncated singular value decomposition",
            _leading,
            work=lambda size: _svd_work(size, 1),
            memory=_matrices,
        ),
    ),
    "shrink": Case(
        lambda layer: Shrink(sum(_taus(layer)), MU),
        flops=lambda layer: 8 * layer.size.small * layer.size.numel,
        bytes=lambda size, item: 16 * size.numel,
        work=lambda size: EIGEN * size.small**3 + 4 * size.numel * size.small,
        computes="float64",
        settings=f"mu {MU:g}",
        peer=Peer(
            "LoRE-Merging's thresholding",
            _thresholded,
            work=lambda size: _svd_work(size, 1),
            memory=_matrices,
        ),
    ),
    "resmerge": Case(
        lambda layer: Resmerge(layer.base, layer.experts),
        flops=lambda layer: layer.size.tasks * 12 * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: 40000 * size.tasks * size.numel,
        computes="float64",
        peer=Peer(
            "ResMerge's full singular value decompositions",
            _residuals,
            work=lambda size: _svd_work(size, size.tasks),
            memory=_matrices,
        ),
    ),
    "doge": Case(
        lambda layer: Doge(layer.base, layer.experts, [0.0] * layer.size.tasks, steps=DOGE_STEPS, lr=DOGE_LR),
        flops=lambda layer: DOGE_STEPS * (4 * layer.size.tasks + 2 * layer.size.d_out // 3) * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: (
            (size.tasks + 1) * EIGEN * size.small**3 + DOGE_STEPS * (400 * size.tasks + 2 * size.d_out) * size.numel
        ),
        computes="float64",
        settings=f"{DOGE_STEPS} steps, nothing trimmed",
        peer=Peer(
            "DOGE's steps by autograd",
            _descended,
            work=lambda size: (
                _svd_work(size, size.tasks + 1) + DOGE_STEPS * (2000 * size.tasks + 2 * size.d_out) * size.numel
            ),
            memory=lambda size: 2 * _matrices(size),
            tolerance=1e-3,
        ),
    ),
    "cover_sum": Case(
        lambda layer: CoverSum(layer.base, layer.experts, core_share=CORE_SHARE),
        flops=lambda layer: layer.size.tasks * 4 * layer.size.small * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + 4 * size.numel,
        work=lambda size: (size.tasks + 2) * (EIGEN * size.small**3 + 4 * size.numel * size.small),
        computes="float64",
        settings=f"core_share {CORE_SHARE:g}",
        peer=Peer(
            "DC-Merge's singular value decompositions",
            _covered,
            work=lambda size: _svd_work(size, size.tasks + 2),
            memory=_matrices,
            tolerance=1e-4,
        ),
    ),
}
