"""Random masks of task vectors: one probability for all elements, or one that grows with the rank in the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK, row_bytes
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import TaskMasks, blocks, magnitude_keys, pack
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype, task_vector
from pymerge.ops._philox import uniform_words

# Probabilities are compared with 32-bit numbers as multiples of 2^-32.
ONE = 2.0**32


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    first: int = 0,
) -> None:
    """Raise ArgumentError unless tensors agree, each expert has a key and probabilities of 0 to 1 in their order, and
    `first` is a multiple of 64."""
    check_task_tensors("random_mask", base, experts)
    for label, values in (("lowest", lowest), ("highest", highest), ("keys", keys)):
        check_length("random_mask", label, values, len(experts))
    for low, high in zip(lowest, highest, strict=True):
        if not 0.0 <= low <= high <= 1.0:
            raise ArgumentError(f"random_mask: probabilities {low:g} to {high:g}; give 0 <= lowest <= highest <= 1")
    for key in keys:
        if not 0 <= key < 2**64:
            raise ArgumentError(f"random_mask: key {key} is not one of 64 bits; take it from philox.key_of")
    if first < 0 or first % 64:
        raise ArgumentError(f"random_mask: the first element is number {first}; give a multiple of 64")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    first: int = 0,
) -> TaskMasks:
    """Return masks that keep element i of task t with probability p_ti, independently.

    Args:
        base: W_0, any shape, floating point; its rows run along the last dimension.
        experts: T tensors W_t like it.
        lowest, highest: T probabilities each. p = lowest + (highest - lowest) r / (c - 1), where r = 0 ... c - 1 is the
            rank of |tau| in its row of c elements, ascending, equal ones in the order of their index; the mean of both
            where c is 1. With lowest = highest there is nothing to rank.
        keys: T keys of 64 bits; element i is kept if the 32-bit number first + i of Philox is below p 2^32.
        first: the number of the first element, where the tensors are rows of larger ones.

    L1 norms are summed in float64. Source: DARE, arXiv 2311.03099 (one probability); DELLA-Merging, arXiv 2406.11617
    (ranks); the generator: see pymerge.ops._philox.
    """
    numel, flat, device = base.numel(), base.reshape(-1), base.device
    columns = base.shape[-1] if base.ndim else 1
    # Whole rows, and whole bytes of the mask.
    size = max(1, BLOCK // max(8 * columns, 1)) * 8 * columns if columns else BLOCK
    bits = torch.zeros(len(experts), row_bytes(numel), dtype=torch.uint8, device=device)
    before = torch.zeros(len(experts), dtype=torch.float64, device=device)
    after = torch.zeros_like(before)
    for t, expert in enumerate(experts):
        other, dtype = expert.reshape(-1), compute_dtype(base, expert)
        for begin, end in blocks(numel, size):
            delta = task_vector(flat[begin:end], other[begin:end], None, dtype)
            limits = _limits(lowest[t], highest[t], columns, device)
            if len(limits) > 1:
                order = magnitude_keys(delta).view(-1, columns).argsort(dim=1, stable=True)
                limits = torch.empty_like(order).scatter_(1, order, limits.expand_as(order)).view(-1)
            keep = uniform_words(keys[t], first + begin, first + end, device) < limits
            packed = pack(keep)
            bits[t, begin // 8 : begin // 8 + len(packed)] = packed
            sizes = delta.abs().to(torch.float64)
            before[t] += sizes.sum()
            after[t] += (sizes * keep).sum()
    return TaskMasks(bits, before, after)


def _limits(lowest: float, highest: float, columns: int, device: torch.device) -> Tensor:
    """p 2^32 by rank, rounded down; one number where all are the same."""
    if lowest == highest or columns < 2:
        return torch.tensor([int((lowest + highest) / 2 * ONE)], device=device)
    step = (highest - lowest) / (columns - 1)
    ranks = torch.arange(columns, dtype=torch.float64, device=device)
    return ((ranks * step + lowest) * ONE).to(torch.int64)


OP = FunctionOp("random_mask", check, reference, "random masks of the task vectors, by Philox, with their L1 norms")
