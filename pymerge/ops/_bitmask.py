"""Masks of task vectors, a bit an element, and what is needed to make and apply them in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.common.arrays import ArrayLike, dtype_of
from pymerge.common.shapes import BLOCK, DEVICE_BLOCK, row_bytes
from pymerge.errors import ArgumentError
from pymerge.ops._op import device_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


class TaskMasks(NamedTuple):
    """Masks of T task vectors, and their L1 norms."""

    bits: ArrayLike  # [T, 8 ceil(numel / 64)] uint8: element i is bit i % 8 of byte i // 8; bits behind the last are 0
    before: NDArray[Any]  # [T] float64: sum of |tau_t|
    after: NDArray[Any]  # [T] float64: sum of |tau_t| over what is kept; what is not is multiplied by 0


def blocks(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks of a flat tensor."""
    return ((begin, min(begin + size, numel)) for begin in range(0, numel, size))


def block_of(values: ArrayLike) -> int:
    """Elements that a reference works on at once, where these values are."""
    return DEVICE_BLOCK if device_of(values).startswith("cuda") else BLOCK


def pack(keep: Tensor) -> Tensor:
    """Bits of a flat bool tensor, in whole bytes."""
    import torch

    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, begin: int, end: int) -> Tensor:
    """Elements `begin` (a multiple of 8) to `end` of one task's mask, as bool."""
    import torch

    taken = bits[begin // 8 : -(-end // 8)].unsqueeze(1)
    spread = (taken >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.view(-1)[: end - begin].bool()


def magnitude_keys(delta: Tensor) -> Tensor:
    """Bits of |delta| as int64: ordered as the magnitudes are, NaN above infinity."""
    import torch

    if delta.dtype == torch.float64:
        return delta.abs().view(torch.int64)
    return delta.abs().view(torch.int32).to(torch.int64)


def check_bits(op: str, bits: ArrayLike, tasks: int, numel: int) -> None:
    """Raise ArgumentError unless `bits` are the masks of so many task vectors of this size."""
    expected = (tasks, row_bytes(numel))
    if tuple(bits.shape) != expected or dtype_of(bits) != "U8":
        raise ArgumentError(
            f"{op}: the masks are {bits.dtype} of shape {tuple(bits.shape)}, expected uint8 of {expected}; "
            "take them from magnitude_mask or random_mask"
        )


class MaskBuilder:
    """Masks and L1 norms that a reference fills block by block; norms are summed in float64 on the device."""

    def __init__(self, tasks: int, numel: int, device: torch.device) -> None:
        import torch

        self._bits = torch.zeros(tasks, row_bytes(numel), dtype=torch.uint8, device=device)
        self._before = torch.zeros(tasks, dtype=torch.float64, device=device)
        self._after = torch.zeros_like(self._before)

    def add(self, task: int, begin: int, delta: Tensor, keep: Tensor) -> None:
        """The elements of a task from number `begin` on: tau, and which of it is kept."""
        packed = pack(keep)
        self._bits[task, begin // 8 : begin // 8 + len(packed)] = packed
        sizes = delta.abs().double()
        self._before[task] += sizes.sum()
        self._after[task] += (sizes * keep).sum()

    def masks(self) -> TaskMasks:
        """All that was added."""
        return TaskMasks(self._bits, self._before.cpu().numpy(), self._after.cpu().numpy())
