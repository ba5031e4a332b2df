"""task_dots: <v_s, v_t> of models or task vectors, products and sums in float64.

A program takes a part of one vector. Each of its threads keeps a sum for every pair of tensors and adds up elements
that lie BLOCK apart; threads are added once, at the end. Registers hold the sums of a group of tensors with a group;
where there are more tensors, each pair of groups is a launch. Programs write their own sums, which are added in their
order, the same on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Table, Variant, sizes

# Tensors of a group: 36 pairs of one with itself, 64 of two.
GROUP = 8


@triton.jit
def _values(tensors, base, offsets, mask, HAS_BASE: tl.constexpr):
    """v_t of each tensor in float64, from deltas in float32; 0 where there is no element."""
    values = ()
    for t in tl.static_range(len(tensors)):
        value = tl.load(tensors[t] + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_BASE:
            value -= tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
        values += (value.to(tl.float64),)
    return values


@triton.jit
def task_dots_kernel(
    sums,  # [vectors, parts, T, T] float64
    base,  # [vectors, length], as the tensors
    left,  # tuple of pointers: tensors number `first_left` on
    right,  # tuple of pointers: tensors number `first_right` on; the same group, or an earlier one
    first_left,
    first_right,
    tasks,
    length,
    parts,
    HAS_BASE: tl.constexpr,
    SAME: tl.constexpr,  # the two groups are one: pairs of its lower triangle
    PART: tl.constexpr,  # elements
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    vector = place // parts
    start = (place % parts) * PART
    totals = ()
    for s in tl.static_range(len(left)):
        for _ in tl.static_range(s + 1 if SAME else len(right)):
            totals += (tl.zeros((BLOCK,), dtype=tl.float64),)
    for step in range(0, tl.minimum(length - start, PART), BLOCK):
        column = start + step + tl.arange(0, BLOCK)
        mask = column < length
        offsets = vector * length + column
        ours = _values(left, base, offsets, mask, HAS_BASE)
        theirs = ours
        if not SAME:
            theirs = _values(right, base, offsets, mask, HAS_BASE)
        added = ()
        for s in tl.static_range(len(left)):
            for t in tl.static_range(s + 1 if SAME else len(right)):
                added += (totals[len(added)] + ours[s] * theirs[t],)
        totals = added
    sums += place * tasks * tasks
    for s in tl.static_range(len(left)):
        for t in tl.static_range(s + 1 if SAME else len(right)):
            total = totals[(s * (s + 1)) // 2 + t if SAME else s * len(right) + t]
            tl.store(sums + (first_left + s) * tasks + first_right + t, tl.sum(total, 0))


def launch(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Return [vectors, T, T] float64.

    base and tensors: [vectors, length], contiguous; float32, float16 or bfloat16.
    """
    vectors, length = tensors[0].shape
    tasks, device = len(tensors), tensors[0].device
    size = sizes("task_dots", device, lambda part: vectors * triton.cdiv(length, part))
    parts = triton.cdiv(length, size.block)
    sums = torch.zeros(vectors, parts, tasks, tasks, dtype=torch.float64, device=device)
    groups = range(0, tasks if sums.numel() else 0, GROUP)
    for first, second in [(first, second) for first in groups for second in groups if second <= first]:
        task_dots_kernel[(vectors * parts,)](
            sums,
            sums if base is None else base,
            tuple(tensors[first : first + GROUP]),
            tuple(tensors[second : second + GROUP]),
            first,
            second,
            tasks,
            length,
            parts,
            HAS_BASE=base is not None,
            SAME=first == second,
            PART=size.block,
            BLOCK=size.depth,
            num_warps=size.warps,
        )
    lower = sums.sum(1)
    return lower + lower.tril(-1).mT


def variants(table: Table) -> Iterator[Variant]:
    """Pairs of a group of tensors with itself, and with another."""
    size = table["task_dots"][0]
    for name, same in (("triangle", True), ("square", False)):
        types = dict.fromkeys(("first_left", "first_right", "tasks", "length", "parts"), "i32")
        types |= {"sums": "*fp64", "base": "*bf16", "left": ("*bf16",) * GROUP, "right": ("*bf16",) * GROUP}
        constants = {"HAS_BASE": True, "SAME": same, "PART": size.block, "BLOCK": size.depth}
        yield Variant(f"task_dots {name}", task_dots_kernel, types, constants, size)
