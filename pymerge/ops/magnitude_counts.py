"""Counts of magnitudes by a digit of their bits: selection over a tensor that is seen part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import blocks, magnitude_keys
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_task_tensors, compute_dtype, task_vector

_MOST_BITS = 16


def check(base: Tensor, experts: Sequence[Tensor], prefixes: Sequence[int], shift: int, bits: int) -> None:
    """Raise ArgumentError unless tensors agree, there is a prefix for each expert, and the digit is one of a key."""
    check_task_tensors("magnitude_counts", base, experts)
    check_length("magnitude_counts", "prefixes", prefixes, len(experts))
    if not (0 <= bits <= _MOST_BITS and 0 <= shift <= 63 - bits):
        raise ArgumentError(
            f"magnitude_counts: a digit of {bits} bits from bit {shift} on; give 0 to {_MOST_BITS} of the lower 63"
        )


def reference(base: Tensor, experts: Sequence[Tensor], prefixes: Sequence[int], shift: int, bits: int) -> Tensor:
    """Return how many |tau_t| have each value of a digit, [T, 2^bits] int64.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        prefixes: T numbers; of task t only elements whose key shifted right by shift + bits is prefixes[t] count.
        shift, bits: the digit is (key >> shift) & (2^bits - 1); with 0 bits there is one value.

    A key is the magnitude's bits as an integer (see `trim_threshold`). Deltas in float32 (float64 if an input is).
    """
    counts = torch.zeros(len(experts), 1 << bits, dtype=torch.int64, device=base.device)
    flat = base.reshape(-1)
    for t, (expert, prefix) in enumerate(zip(experts, prefixes, strict=True)):
        other, dtype = expert.reshape(-1), compute_dtype(base, expert)
        for begin, end in blocks(base.numel()):
            keys = magnitude_keys(task_vector(flat[begin:end], other[begin:end], None, dtype))
            matching = keys[(keys >> (shift + bits)) == prefix] >> shift
            counts[t] += torch.bincount(matching & ((1 << bits) - 1), minlength=1 << bits)
    return counts


OP = FunctionOp("magnitude_counts", check, reference, "how many |tau_t| have each value of a digit of their bits")
