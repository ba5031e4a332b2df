"""Masks that keep a range of magnitudes of each task vector, and its L1 norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.common.shapes import row_bytes
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import TaskMasks, blocks, magnitude_keys, pack
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype, task_vector
from pymerge.ops.trim_threshold import Thresholds


def check(base: Tensor, experts: Sequence[Tensor], kept: Thresholds, dropped: Thresholds | None = None) -> None:
    """Raise ArgumentError unless tensors agree and there is a threshold for each expert."""
    check_task_tensors("magnitude_mask", base, experts)
    for thresholds in (kept, dropped):
        if thresholds is not None and not len(thresholds.keys) == len(thresholds.ends) == len(experts):
            raise ArgumentError(
                f"magnitude_mask: {len(thresholds.keys)} thresholds for {len(experts)} experts; "
                "take them from trim_threshold on the same experts"
            )


def reference(
    base: Tensor, experts: Sequence[Tensor], kept: Thresholds, dropped: Thresholds | None = None
) -> TaskMasks:
    """Return the masks of the largest elements, as far as `kept` says, without the very largest that `dropped` selects.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        kept, dropped: from `trim_threshold` on the same tensors.

    Deltas in float32 (float64 if an input is); L1 norms are summed in float64. Source: TIES-Merging, arXiv 2306.01708;
    Model Breadcrumbs, arXiv 2312.06795.
    """
    numel, flat, device = base.numel(), base.reshape(-1), base.device
    bits = torch.zeros(len(experts), row_bytes(numel), dtype=torch.uint8, device=device)
    before = torch.zeros(len(experts), dtype=torch.float64, device=device)
    after = torch.zeros_like(before)
    for t, expert in enumerate(experts):
        other, dtype = expert.reshape(-1), compute_dtype(base, expert)
        for begin, end in blocks(numel):
            delta = task_vector(flat[begin:end], other[begin:end], None, dtype)
            keep = _selected(delta, kept, t, begin)
            if dropped is not None:
                keep &= ~_selected(delta, dropped, t, begin)
            packed = pack(keep)
            bits[t, begin // 8 : begin // 8 + len(packed)] = packed
            sizes = delta.abs().to(torch.float64)
            before[t] += sizes.sum()
            after[t] += (sizes * keep).sum()
    return TaskMasks(bits, before, after)


def _selected(delta: Tensor, thresholds: Thresholds, task: int, begin: int) -> Tensor:
    keys, key = magnitude_keys(delta), thresholds.keys[task]
    places = torch.arange(begin, begin + len(delta), device=delta.device)
    return (keys > key) | ((keys == key) & (places < thresholds.ends[task]))


OP = FunctionOp(
    "magnitude_mask", check, reference, "masks of a range of magnitudes of each task vector, with its L1 norms"
)
