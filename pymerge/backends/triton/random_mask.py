"""`random_mask` in one pass over the weights; tasks whose elements have ranks go to PyTorch, which sorts rows."""

from __future__ import annotations

from pymerge.backends.triton._arguments import on
from pymerge.backends.triton._masks import unset_bits
from pymerge.common.arrays import as_tensor
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.random_mask import ONE, RandomMask


def compute(op: RandomMask, threads: int) -> TaskMasks:
    """The masks."""
    import torch

    from pymerge.kernels import random_mask as kernel

    ranked = [low != high and op.columns > 1 for low, high in zip(op.lowest, op.highest, strict=True)]
    if any(ranked):
        return _by_task(op, ranked, threads)
    base = as_tensor(op.base).contiguous()
    bits, inputs = unset_bits(len(op.experts), base), [as_tensor(expert).contiguous() for expert in op.experts]
    limits = [int((low + high) / 2 * ONE) for low, high in zip(op.lowest, op.highest, strict=True)]
    signed = [key - (key >> 63 << 64) for key in op.keys]  # the same bits
    numbers = torch.tensor([signed, limits], dtype=torch.int64).to(base.device)
    with on(base.device):
        before, after = kernel.launch(bits, base, inputs, numbers[0], numbers[1], op.first)
    return TaskMasks(bits, before.cpu().numpy(), after.cpu().numpy())


def _by_task(op: RandomMask, ranked: list[bool], threads: int) -> TaskMasks:
    """Masks of the tasks with ranks from the reference, of the others from the kernel, in their order."""
    import numpy as np
    import torch

    tasks = zip(op.experts, op.lowest, op.highest, op.keys, strict=True)
    ops = [RandomMask(op.base, [expert], [low], [high], [key], op.first, op.norms) for expert, low, high, key in tasks]
    masks = [each.reference() if by_rank else compute(each, threads) for each, by_rank in zip(ops, ranked, strict=True)]
    bits = torch.cat([as_tensor(each.bits) for each in masks])
    before, after = (np.concatenate([each[place] for each in masks]) for place in (1, 2))
    return TaskMasks(bits, before, after)
