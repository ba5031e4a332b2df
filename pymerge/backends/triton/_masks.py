"""Masks, thresholds and bases of the kernels on sparse task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import row_bytes
from pymerge.ops.trim_threshold import Thresholds

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def base_or_zeros(base: ArrayLike | None, like: ArrayLike) -> Tensor:
    """The base, contiguous; zeros like a task vector where there is none."""
    import torch

    return torch.zeros_like(as_tensor(like)).contiguous() if base is None else as_tensor(base).contiguous()


def unset_bits(tasks: int, like: Tensor) -> Tensor:
    """Room for the masks of so many tasks; the kernels write every byte."""
    import torch

    return torch.empty(tasks, row_bytes(like.numel()), dtype=torch.uint8, device=like.device)


def on_device(thresholds: Thresholds, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and ends, [T] int64, where the kernels read them."""
    import torch

    keys, ends = (torch.from_numpy(numbers).to(device) for numbers in thresholds)
    return keys, ends
