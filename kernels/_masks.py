"""Parts that magnitude_mask and random_mask share: flags written as bits, and L1 norms in float64.

Every program writes the sums of its own elements; they are added in the order of the programs, which is the same on
every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Sizes, sizes, words_of


@triton.jit
def task_delta(expert, origin, offsets, mask):
    """tau in float32, 0 behind the last element."""
    return tl.load(expert + offsets, mask=mask, other=0.0).to(tl.float32) - origin


@triton.jit
def store_mask(bits, norms, task, word, words, flags, delta):
    """Write one task's flags [words, 32] as bits, and the sums of |delta| and of |delta| where a flag is 1."""
    ones = flags.to(tl.int32)
    packed = tl.sum(ones << tl.arange(0, 32)[None, :], 1)
    tl.store(bits + task * words + word, packed, mask=word < words)
    size = tl.abs(delta).to(tl.float64)
    programs = tl.num_programs(0)
    place = 2 * task * programs + tl.program_id(0)
    tl.store(norms + place, tl.sum(tl.sum(size, 1), 0))
    tl.store(norms + place + programs, tl.sum(tl.sum(size * ones.to(tl.float64), 1), 0))


class Output(NamedTuple):
    """Outputs of a launch, and its sizes."""

    bits: Tensor  # [T, words] int32
    norms: Tensor  # [T, 2, programs] float64: sums of each program
    programs: int
    size: Sizes


def output(bits: Tensor, count: int) -> Output:
    """Room for what one launch over `count` elements writes; `bits` are [T, bytes] uint8."""
    size = sizes("mask", bits.device, lambda block: triton.cdiv(count, block))
    programs = triton.cdiv(count, size.block)
    norms = torch.empty(len(bits), 2, programs, dtype=torch.float64, device=bits.device)
    return Output(words_of(bits), norms, programs, size)
