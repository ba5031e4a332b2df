"""Tensors in memory as entries of a checkpoint: plans take them as they take files. The module imports no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class HeldEntry(TensorEntry):
    """A tensor that somebody holds in memory, on any device: never copied but by who reads it.

    `file` is what messages call its model, and `offset` a number that tensors share which are one.
    """

    tensor: torch.Tensor = field(kw_only=True, compare=False, repr=False)

    @property
    def contiguous(self) -> bool:
        return False  # no bytes of a file

    @property
    def needs_torch(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> HeldEntry:
        """The entry of rows `start` to `stop` (exclusive), of the same memory."""
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * math.prod(self.shape[1:]),
            nbytes=(stop - start) * math.prod(self.shape[1:]) * ITEM_SIZES[self.dtype],
            first_row=self.first_row + start,
            tensor=self.tensor[start:stop],
        )
