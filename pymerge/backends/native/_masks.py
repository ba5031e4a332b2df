"""Masks and thresholds of task vectors as csrc/bindings takes them."""

from __future__ import annotations

import numpy as np

from pymerge.backends.native._arguments import address, numpy_address
from pymerge.common.arrays import Array, ArrayLike
from pymerge.common.shapes import row_bytes
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops._op import numel_of
from pymerge.ops.trim_threshold import Thresholds


def no_masks(tasks: int, like: ArrayLike) -> TaskMasks:
    """Masks with nothing in them, bits of the kind of `like`: words that no element reaches stay 0."""
    size = tasks, row_bytes(numel_of(like))
    return TaskMasks(_zeros(size, like), np.zeros(tasks), np.zeros(tasks))


def mask_addresses(masks: TaskMasks, norms: bool = True) -> tuple[int, int, int]:
    """Addresses of masks to be written; without `norms` nothing is summed."""
    if not norms:
        return address(masks.bits), 0, 0
    return address(masks.bits), numpy_address(masks.before), numpy_address(masks.after)


def threshold_addresses(thresholds: Thresholds | None) -> tuple[int, int] | None:
    """Addresses of keys and ends, if there are any."""
    return None if thresholds is None else (numpy_address(thresholds.keys), numpy_address(thresholds.ends))


def _zeros(size: tuple[int, int], like: ArrayLike) -> ArrayLike:
    if isinstance(like, Array):
        return Array.of(np.zeros(size, np.uint8))
    import torch

    return torch.zeros(*size, dtype=torch.uint8)
