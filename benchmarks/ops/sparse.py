"""Ops on sparse task vectors; beside mergekit's forms: sorts of whole tensors, float masks, stacked deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.layers import DENSITY, EPSILON, Layer, Size
from benchmarks.ops.case import Case, Peer, weights_read
from pymerge.common.shapes import row_bytes
from pymerge.ops._bitmask import pack, unpack
from pymerge.ops.magnitude_counts import MagnitudeCounts
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.magnitude_place import MagnitudePlace
from pymerge.ops.random_mask import RandomMask
from pymerge.ops.sparse_combine import SparseCombine
from pymerge.ops.trim_threshold import TrimThreshold


def _deltas(layer: Layer) -> list[Tensor]:
    return [expert.float() - layer.base.float() for expert in layer.experts]


def _bits(masks: list[Tensor]) -> Tensor:
    bits = torch.zeros(len(masks), row_bytes(masks[0].numel()), dtype=torch.uint8, device=masks[0].device)
    for row, mask in zip(bits, masks, strict=True):
        packed = pack(mask.reshape(-1).bool())
        row[: len(packed)] = packed
    return bits


def _largest(delta: Tensor) -> Tensor:
    # mergekit's sort is not stable; a stable one keeps the same elements as the op where magnitudes are equal.
    order = delta.abs().reshape(-1).argsort(descending=True, stable=True)
    return order[: int(DENSITY * delta.numel())]


def _thresholds(layer: Layer) -> tuple[Tensor, ...]:
    deltas = _deltas(layer)
    smallest = torch.stack([delta.reshape(-1)[_largest(delta)[-1]].abs() for delta in deltas])
    return (smallest.view(torch.int32),)


def _counts(layer: Layer) -> tuple[Tensor, ...]:
    digits = [delta.abs().reshape(-1).view(torch.int32) >> 15 for delta in _deltas(layer)]
    return (torch.stack([torch.bincount(each, minlength=2**16) for each in digits]),)


def _places(layer: Layer) -> tuple[Tensor, ...]:
    keys = (layer.experts[0].float() - layer.base.float()).abs().reshape(-1).view(torch.int32)
    return (torch.nonzero(keys == int(layer.thresholds.keys[0]))[:1, 0] + 1,)


def _magnitude_masks(layer: Layer) -> tuple[Tensor, ...]:
    masks = []
    for delta in _deltas(layer):
        mask = torch.zeros(delta.numel(), device=delta.device)
        mask[_largest(delta)] = 1
        masks.append(mask)
    return (_bits(masks),)


def _random_masks(layer: Layer) -> tuple[Tensor, ...]:
    generator = torch.Generator(layer.base.device).manual_seed(0)
    return (_bits([torch.bernoulli(torch.full_like(d, DENSITY), generator=generator) for d in _deltas(layer)]),)


def _ranked_masks(layer: Layer) -> tuple[Tensor, ...]:
    masks = []
    for delta in _deltas(layer):
        ranks = delta.abs().argsort(dim=1).argsort(dim=1).float()
        probabilities = DENSITY - EPSILON + ranks / max(1, delta.shape[1] - 1) * 2 * EPSILON
        masks.append(torch.bernoulli(probabilities, generator=torch.Generator(delta.device).manual_seed(0)))
    return (_bits(masks),)


def _elected(layer: Layer) -> tuple[Tensor, ...]:
    deltas = torch.stack(_deltas(layer))
    for delta, bits in zip(deltas, layer.masks.bits, strict=True):
        delta *= unpack(bits, 0, delta.numel()).view(delta.shape)
    signs = (deltas.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
    agree = deltas.sign() == signs
    share = agree.sum(dim=0).to(deltas.dtype)
    share[share == 0] = 1
    return (layer.base.float() + (deltas * agree).sum(dim=0) / share,)


TRIM_THRESHOLD = Peer(
    "mergekit's sort",
    _thresholds,
    work=lambda size: 8000 * size.tasks * size.numel,
    memory=lambda size: (4 * size.tasks + 24) * size.numel,
)
MAGNITUDE_COUNTS = Peer(
    "plain PyTorch's bincount",
    _counts,
    work=lambda size: 700 * size.tasks * size.numel,
    memory=lambda size: (4 * size.tasks + 24) * size.numel,
)
MAGNITUDE_PLACE = Peer(
    "plain PyTorch's comparison and nonzero",
    _places,
    work=lambda size: 700 * size.numel,
    memory=lambda size: 16 * size.numel,
)
MAGNITUDE_MASK = Peer(
    "mergekit's sort and float mask",
    _magnitude_masks,
    work=lambda size: 9000 * size.tasks * size.numel,
    memory=lambda size: (8 * size.tasks + 24) * size.numel,
)
# Other random numbers: which elements are kept has nothing in common.
RANDOM_MASK = Peer(
    "mergekit's Bernoulli draws",
    _random_masks,
    work=lambda size: 1500 * size.tasks * size.numel,
    memory=lambda size: (8 * size.tasks + 16) * size.numel,
    tolerance=2.0,
)
RANDOM_MASK_RANKS = Peer(
    "mergekit's two sorts of rows and Bernoulli draws",
    _ranked_masks,
    work=lambda size: 8000 * size.tasks * size.numel,
    memory=lambda size: (8 * size.tasks + 40) * size.numel,
    tolerance=2.0,
)
SPARSE_COMBINE = Peer(
    "mergekit's stacked deltas and masks",
    _elected,
    work=lambda size: 1500 * size.tasks * size.numel,
    memory=lambda size: 16 * (size.tasks + 1) * size.numel,
    tolerance=1e-2,
)


def _probabilities(size: Size, epsilon: float) -> tuple[list[float], list[float]]:
    low, high = DENSITY - epsilon, DENSITY + epsilon
    return [low] * size.tasks, [high] * size.tasks


CASES = {
    "trim_threshold": Case(
        lambda layer: TrimThreshold(layer.base, layer.experts, layer.counts),
        flops=lambda layer: layer.size.tasks * layer.size.numel,
        bytes=weights_read,
        work=lambda size: 2000 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=TRIM_THRESHOLD,
    ),
    "magnitude_counts": Case(
        lambda layer: MagnitudeCounts(layer.base, layer.experts, [0] * layer.size.tasks, 15, 16),
        flops=lambda layer: layer.size.tasks * layer.size.numel,
        bytes=weights_read,
        work=lambda size: 700 * size.tasks * size.numel,
        settings="first of two digits",
        peer=MAGNITUDE_COUNTS,
    ),
    "magnitude_place": Case(
        lambda layer: MagnitudePlace(layer.base, layer.experts[0], int(layer.thresholds.keys[0]), 1),
        flops=lambda layer: layer.size.numel,
        bytes=lambda size, item: 2 * size.numel * item,
        work=lambda size: 700 * size.numel,
        settings="last element of its magnitude",
        peer=MAGNITUDE_PLACE,
    ),
    "magnitude_mask": Case(
        lambda layer: MagnitudeMask(layer.base, layer.experts, layer.thresholds),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 1500 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=MAGNITUDE_MASK,
    ),
    "random_mask": Case(
        lambda layer: RandomMask(layer.base, layer.experts, *_probabilities(layer.size, 0.0), range(layer.size.tasks)),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 1500 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}",
        peer=RANDOM_MASK,
    ),
    "random_mask-ranks": Case(
        lambda layer: RandomMask(
            layer.base,
            layer.experts,
            *_probabilities(layer.size, EPSILON),
            range(layer.size.tasks),
        ),
        flops=lambda layer: 3 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + size.tasks * size.numel // 8,
        work=lambda size: 6000 * size.tasks * size.numel,
        settings=f"density {DENSITY:g}, epsilon {EPSILON:g}",
        peer=RANDOM_MASK_RANKS,
    ),
    "sparse_combine": Case(
        lambda layer: SparseCombine(
            layer.base, layer.experts, [1.0] * layer.size.tasks, bits=layer.masks.bits, elect=True, normalize=True
        ),
        flops=lambda layer: 6 * layer.size.tasks * layer.size.numel,
        bytes=lambda size, item: weights_read(size, item) + item * size.numel + size.tasks * size.numel // 8,
        work=lambda size: 900 * size.tasks * size.numel,
        peer=SPARSE_COMBINE,
    ),
}
