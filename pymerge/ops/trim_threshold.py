"""Exact selection by magnitude: where the k largest elements of each task vector end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.common.shapes import exact
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import blocks, magnitude_keys
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype, task_vector
from pymerge.ops.magnitude_counts import reference as magnitude_counts

_DIGIT = 11  # bits


class Thresholds(NamedTuple):
    """The k largest magnitudes of task t are those with a key above keys[t], and those equal to it whose element index
    is below ends[t]. A key is the magnitude's bits as an integer.
    """

    keys: Tensor  # [T] int64
    ends: Tensor  # [T] int64


def check(base: Tensor, experts: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Raise ArgumentError unless tensors agree and each count is one of 0 to the number of elements."""
    check_task_tensors("trim_threshold", base, experts)
    check_length("trim_threshold", "counts", counts, len(experts))
    for count in counts:
        if not 0 <= count <= base.numel():
            raise ArgumentError(f"trim_threshold: count {count} of {base.numel()} elements; give 0 to {base.numel()}")


def reference(base: Tensor, experts: Sequence[Tensor], counts: Sequence[int]) -> Thresholds:
    """Return where the k_t largest |tau_t| of each task end.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        counts: T numbers k_t, 0 to numel.

    Elements of equal magnitude are taken in the order of their index, so exactly k_t are selected. NaN counts as larger
    than infinity. Where all elements at the threshold are taken, ends[t] is numel; otherwise it is the index behind the
    last one. Deltas in float32 (float64 if an input is). Radix selection from the top: no sort, and no copy of the
    task vector. Source: the trim step of TIES-Merging, arXiv 2306.01708.
    """
    keys, ends = zip(*(_one(base, expert, count) for expert, count in zip(experts, counts, strict=True)), strict=True)
    return Thresholds(torch.tensor(keys, device=base.device), torch.tensor(ends, device=base.device))


def _one(base: Tensor, expert: Tensor, count: int) -> tuple[int, int]:
    numel = base.numel()
    known = exact(numel, count)
    if known is not None:
        return known
    prefix, left, bits = 0, count, 63 if compute_dtype(base, expert) == torch.float64 else 31
    ties = numel
    while bits:
        digit = min(_DIGIT, bits)
        bits -= digit
        counts = magnitude_counts(base, [expert], [prefix], bits, digit)[0]
        place, left, ties = last_kept(counts, left)
        prefix = (prefix << digit) | place
    return prefix, numel if left == ties else behind(base, expert, prefix, left)


def last_kept(counts: Tensor, left: int) -> tuple[int, int, int]:
    """Value of a digit, from the top, in which the `left`-th element is; the elements taken of it, and all of it."""
    numbers = counts.tolist()
    place = len(numbers) - 1
    while numbers[place] < left:
        left -= numbers[place]
        place -= 1
    return place, left, numbers[place]


def behind(base: Tensor, expert: Tensor, key: int, left: int) -> int:
    """The index behind the `left`-th element with this key."""
    flat, other, dtype = base.reshape(-1), expert.reshape(-1), compute_dtype(base, expert)
    for begin, end in blocks(base.numel()):
        keys = magnitude_keys(task_vector(flat[begin:end], other[begin:end], None, dtype))
        found = torch.nonzero(keys == key).view(-1)
        if len(found) >= left:
            return begin + int(found[left - 1]) + 1
        left -= len(found)
    raise AssertionError("the counts are of other elements")


OP = FunctionOp(
    "trim_threshold", check, reference, "k-th largest |tau_t| by radix selection, ties in order of the index"
)
