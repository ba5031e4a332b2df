"""Random masks of task vectors: one probability for all elements, or one that grows with the rank in the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import MaskBuilder, TaskMasks, block_of, magnitude_keys
from pymerge.ops._blocks import delta_blocks
from pymerge.ops._op import Op, check_length, check_task_tensors, numel_of
from pymerge.ops._philox import uniform_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Probabilities are compared with 32-bit numbers as multiples of 2^-32.
ONE = 2.0**32

# Bytes for an element of a row that is ranked.
_RANK_BYTES = 40
# Rows that are ranked at the same time, each thread one of 32 that follow each other.
_ROWS_OF_A_THREAD = 32
_THREADS = 64


@dataclass(frozen=True, eq=False)
class RandomMask(Op[TaskMasks]):
    """Masks that keep element i of task t with probability p_ti, independently.

    p = lowest + (highest - lowest) r / (c - 1), where r = 0 ... c - 1 is the rank of |tau| in its row of c elements,
    ascending, equal ones in the order of their index; the mean of both where c is 1. With lowest = highest there is
    nothing to rank. L1 norms are summed in float64. Source: DARE, arXiv 2311.03099 (one probability); DELLA-Merging,
    arXiv 2406.11617 (ranks); the generator: see pymerge.ops._philox.
    """

    summary = "random masks of the task vectors, by Philox, with their L1 norms"

    base: ArrayLike  # W_0, any shape, floating point; its rows run along the last dimension
    experts: Sequence[ArrayLike]  # T tensors W_t like it
    lowest: Sequence[float]  # T probabilities
    highest: Sequence[float]  # T probabilities
    keys: Sequence[int]  # T keys of 64 bits; element i is kept if Philox's 32-bit number first + i is below p 2^32
    first: int = 0  # number of the first element, where the tensors are rows of larger ones; a multiple of 64
    norms: bool = True  # whether the L1 norms are wanted; if not, what is in their place means nothing

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree, each expert has a key and probabilities of 0 to 1 in their order,
        and `first` is a multiple of 64.
        """
        check_task_tensors("random_mask", self.base, self.experts)
        for label, values in (("lowest", self.lowest), ("highest", self.highest), ("keys", self.keys)):
            check_length("random_mask", label, values, len(self.experts))
        for low, high in zip(self.lowest, self.highest, strict=True):
            if not 0.0 <= low <= high <= 1.0:
                raise ArgumentError(f"random_mask: probabilities {low:g} to {high:g}; give 0 <= lowest <= highest <= 1")
        for key in self.keys:
            if not 0 <= key < 2**64:
                raise ArgumentError(f"random_mask: key {key} is not one of 64 bits; take it from shapes.key_of")
        if self.first < 0 or self.first % 64:
            raise ArgumentError(f"random_mask: the first element is number {self.first}; give a multiple of 64")

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.base.shape[-1] if self.base.shape else 1

    def reference(self) -> TaskMasks:
        """Draw block by block, whole rows at once."""
        import torch

        base, columns = as_tensor(self.base), self.columns
        # Whole rows, and whole bytes of the mask.
        most = block_of(base)
        size = max(1, most // max(8 * columns, 1)) * 8 * columns if columns else most
        builder = MaskBuilder(len(self.experts), numel_of(base), base.device)
        for t, expert in enumerate(self.experts):
            for begin, end, delta in delta_blocks(base, expert, size):
                limits = _limits(self.lowest[t], self.highest[t], columns, base.device)
                if len(limits) > 1:
                    order = magnitude_keys(delta).view(-1, columns).argsort(dim=1, stable=True)
                    limits = torch.empty_like(order).scatter_(1, order, limits.expand_as(order)).view(-1)
                words = uniform_words(self.keys[t], self.first + begin, self.first + end, base.device)
                builder.add(t, begin, delta, words < limits)
        return builder.masks()

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes that ranking the rows of a tensor takes: in C++ on one thread, elsewhere on as many as there may be."""
        columns = shape[-1] if shape else 1
        rows = math.prod(shape) // max(1, columns)
        at_once = 1 if native else min(-(-rows // _ROWS_OF_A_THREAD), _THREADS)
        return _RANK_BYTES * columns * at_once


def _limits(lowest: float, highest: float, columns: int, device: torch.device) -> Tensor:
    """p 2^32 by rank, rounded down; one number where all are the same."""
    import torch

    if lowest == highest or columns < 2:
        return torch.tensor([int((lowest + highest) / 2 * ONE)], device=device)
    step = (highest - lowest) / (columns - 1)
    ranks = torch.arange(columns, dtype=torch.float64, device=device)
    return ((ranks * step + lowest) * ONE).to(torch.int64)
