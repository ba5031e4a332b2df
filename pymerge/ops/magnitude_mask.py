"""Masks that keep a range of magnitudes of each task vector, and its L1 norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._bitmask import MaskBuilder, TaskMasks, magnitude_keys
from pymerge.ops._blocks import delta_blocks
from pymerge.ops._op import Op, check_vectors, numel_of
from pymerge.ops.trim_threshold import Thresholds, check_thresholds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class MagnitudeMask(Op[TaskMasks]):
    """Masks of the largest elements, as far as `kept` says, without the very largest that `dropped` selects.

    Deltas in float32 (float64 if an input is); L1 norms are summed in float64. Source: TIES-Merging, arXiv 2306.01708;
    Model Breadcrumbs, arXiv 2312.06795.
    """

    summary = "masks of a range of magnitudes of each task vector, with its L1 norms"

    base: ArrayLike | None  # W_0, any shape, floating point; None: the experts themselves are the vectors
    experts: Sequence[ArrayLike]  # T tensors W_t like it
    kept: Thresholds  # from `trim_threshold` on the same tensors
    dropped: Thresholds | None = None  # the same, of fewer elements

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree and there is a threshold for each expert."""
        check_vectors("magnitude_mask", self.base, self.experts)
        for thresholds in (self.kept, self.dropped):
            check_thresholds("magnitude_mask", thresholds, len(self.experts))

    def reference(self) -> TaskMasks:
        """Compare block by block."""
        like = as_tensor(self.like)
        builder = MaskBuilder(len(self.experts), numel_of(like), like.device)
        for t, expert in enumerate(self.experts):
            for begin, _, delta in delta_blocks(self.base, expert):
                keep = _selected(delta, self.kept, t, begin)
                if self.dropped is not None:
                    keep &= ~_selected(delta, self.dropped, t, begin)
                builder.add(t, begin, delta, keep)
        return builder.masks()


def _selected(delta: Tensor, thresholds: Thresholds, task: int, begin: int) -> Tensor:
    """Mask of the elements of a block, from number `begin` on, that the thresholds of a task select."""
    import torch

    keys, key = magnitude_keys(delta), int(thresholds.keys[task])
    places = torch.arange(begin, begin + len(delta), device=delta.device)
    return (keys > key) | ((keys == key) & (places < int(thresholds.ends[task])))
