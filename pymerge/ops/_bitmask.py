"""Masks of task vectors, a bit an element, and what is needed to make and apply them in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK, row_bytes
from pymerge.errors import ArgumentError


class TaskMasks(NamedTuple):
    """Which elements of T task vectors are kept, and their L1 norms."""

    bits: Tensor  # [T, 8 ceil(numel / 64)] uint8: element i is bit i % 8 of byte i // 8; bits behind the last are 0
    before: Tensor  # [T] float64: sum of |tau_t|
    after: Tensor  # [T] float64: sum of |tau_t| over what is kept


def blocks(numel: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks of a flat tensor."""
    return ((begin, min(begin + size, numel)) for begin in range(0, numel, size))


def pack(keep: Tensor) -> Tensor:
    """Bits of a flat bool tensor, in whole bytes."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, begin: int, end: int) -> Tensor:
    """Elements `begin` (a multiple of 8) to `end` of one task's mask, as bool."""
    taken = bits[begin // 8 : -(-end // 8)].unsqueeze(1)
    spread = (taken >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.view(-1)[: end - begin].bool()


def magnitude_keys(delta: Tensor) -> Tensor:
    """Bits of |delta| as int64: ordered as the magnitudes are, NaN above infinity."""
    if delta.dtype == torch.float64:
        return delta.abs().view(torch.int64)
    return delta.abs().view(torch.int32).to(torch.int64)


def check_bits(op: str, bits: Tensor, tasks: int, numel: int) -> None:
    """Raise ArgumentError unless `bits` are the masks of so many task vectors of this size."""
    expected = (tasks, row_bytes(numel))
    if tuple(bits.shape) != expected or bits.dtype != torch.uint8:
        raise ArgumentError(
            f"{op}: the masks are {bits.dtype} of shape {tuple(bits.shape)}, expected uint8 of {expected}; "
            "take them from magnitude_mask or random_mask"
        )
