"""Ops of WEMoE's routed layers; beside the published form, which merges the weights of each sample task by task."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.layers import SAMPLES, TOKENS, Layer
from benchmarks.ops.case import Case, Peer
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.routed_linear import RoutedLinear


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

CASES = {
    "routed_linear": Case(
        lambda layer: RoutedLinear(*layer.routed),
        flops=lambda layer: 2 * SAMPLES * (TOKENS + layer.size.tasks) * layer.size.numel,
        bytes=lambda size, item: (2 * size.tasks + 4) * size.numel + 4 * SAMPLES * TOKENS * (size.d_in + size.d_out),
        work=lambda size: 4 * SAMPLES * (TOKENS + 40 * size.tasks) * size.numel,
        computes="float32",
        settings=f"{SAMPLES} samples of {TOKENS} tokens",
        peer=ROUTED_LINEAR,
    ),
    "mix_weights": Case(
        lambda layer: MixWeights(*layer.mixed),
        flops=lambda layer: 2 * SAMPLES * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: (2 * size.tasks + 4 + 4 * SAMPLES) * size.numel,
        work=lambda size: 160 * SAMPLES * size.tasks * size.numel,
        computes="float32",
        settings=f"{SAMPLES} rows of gates",
        peer=MIX_WEIGHTS,
    ),
}
