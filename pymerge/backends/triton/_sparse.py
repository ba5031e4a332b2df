"""Triton kernels for sparse task vectors: masks by magnitude and at random, and merging what they keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.triton._routed import on
from pymerge.common.shapes import row_bytes
from pymerge.ops import random_mask as random
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.trim_threshold import Thresholds


def magnitude_mask(
    base: Tensor, experts: Sequence[Tensor], kept: Thresholds, dropped: Thresholds | None = None
) -> TaskMasks:
    """`magnitude_mask` in one pass over the weights."""
    from pymerge.kernels import magnitude_mask as kernel

    bits = _bits(len(experts), base)
    inputs = [expert.contiguous() for expert in experts]
    with on(base.device):
        norms = kernel.launch(bits, base.contiguous(), inputs, kept, dropped)
    return TaskMasks(bits, *norms)


def random_mask(
    base: Tensor,
    experts: Sequence[Tensor],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    first: int = 0,
) -> TaskMasks:
    """`random_mask` in one pass over the weights; tasks whose elements have ranks go to PyTorch, which sorts rows."""
    from pymerge.kernels import random_mask as kernel

    columns = base.shape[-1] if base.ndim else 1
    ranked = [low != high and columns > 1 for low, high in zip(lowest, highest, strict=True)]
    if any(ranked):
        return _by_task(base, experts, lowest, highest, keys, ranked, first)
    bits = _bits(len(experts), base)
    limits = [int((low + high) / 2 * random.ONE) for low, high in zip(lowest, highest, strict=True)]
    signed = [key - (key >> 63 << 64) for key in keys]  # the same bits
    numbers = torch.tensor([signed, limits], dtype=torch.int64).to(base.device)
    inputs = [expert.contiguous() for expert in experts]
    with on(base.device):
        norms = kernel.launch(bits, base.contiguous(), inputs, numbers[0], numbers[1], first)
    return TaskMasks(bits, *norms)


def _by_task(
    base: Tensor,
    experts: Sequence[Tensor],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    ranked: Sequence[bool],
    first: int,
) -> TaskMasks:
    """Masks of the tasks with ranks from the reference, of the others from the kernel, in their order."""
    rows = [
        (random.reference if by_rank else random_mask)(base, [expert], [low], [high], [key], first)
        for expert, low, high, key, by_rank in zip(experts, lowest, highest, keys, ranked, strict=True)
    ]
    return TaskMasks(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def sparse_combine(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    *,
    bits: Tensor | None = None,
    factors: Sequence[float] | None = None,
    elect: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`sparse_combine` in one pass over the inputs, with the arithmetic of the C++ backend."""
    from pymerge.kernels import sparse_combine as kernel

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    factors = [1.0] * len(experts) if factors is None else factors
    sizes = [float(weight * factor) for weight, factor in zip(weights, factors, strict=True)]
    inputs = [expert.contiguous() for expert in experts]
    masks = None if bits is None else bits.contiguous()
    with on(base.device):
        kernel.launch(out, base.contiguous(), inputs, masks, sizes, weights, scale, elect, normalize)
    return out


def _bits(tasks: int, base: Tensor) -> Tensor:
    """Room for the masks of so many tasks; the kernels write every byte."""
    return torch.empty(tasks, row_bytes(base.numel()), dtype=torch.uint8, device=base.device)
