"""task_dots: <v_s, v_t> of models or task vectors, products and sums in float64, in one pass over the inputs.

A program takes a part of one vector, and makes the T x T products of `depth` elements at a time by float64 tensor
cores: as many as there are pairs, without a sum across threads for each. Programs write their own sums, which are added
in their order, the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import sizes


@triton.jit
def task_dots_kernel(
    sums,  # [vectors, parts, T, T] float64
    base,  # [vectors, length], as the tensors
    tensors,  # T addresses, int64
    tasks,
    length,
    parts,
    BLOCK: tl.constexpr,  # elements of a part
    DEPTH: tl.constexpr,
    TASKS: tl.constexpr,  # T, rounded up to what products take
    ELEMENT: tl.constexpr,  # element type of the tensors
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,  # all tensors start at multiples of 16 bytes
):
    place = tl.program_id(0).to(tl.int64)
    vector = place // parts
    task = tl.arange(0, TASKS)
    start = (place % parts) * BLOCK
    # Tasks that do not exist read the first one's address, masked.
    rows = tl.load(tensors + tl.where(task < tasks, task, 0)).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    total = tl.zeros((TASKS, TASKS), dtype=tl.float64)
    for step in range(0, tl.minimum(length - start, BLOCK), DEPTH):
        column = start + step + tl.arange(0, DEPTH)
        offsets = vector * length + column
        inside = column < length
        mask = (task < tasks)[:, None] & inside[None, :]
        values = tl.load(rows[:, None] + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BASE:
            origin = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
            values = tl.where(mask, values - origin[None, :], 0.0)
        wide = values.to(tl.float64)
        total = tl.dot(wide, tl.trans(wide), total, input_precision="ieee", out_dtype=tl.float64)
    to = sums + place * tasks * tasks + task[:, None] * tasks + task[None, :]
    tl.store(to, total, mask=(task < tasks)[:, None] & (task < tasks)[None, :])


_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch(base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Return [vectors, T, T] float64.

    base and tensors: [vectors, length], contiguous; the tensors of one dtype, float32, float16 or bfloat16.
    """
    vectors, length = tensors[0].shape
    tasks, device = len(tensors), tensors[0].device
    size = sizes("task_dots", device, lambda block: vectors * triton.cdiv(length, block))
    parts = triton.cdiv(length, size.block)
    sums = torch.empty(vectors, parts, tasks, tasks, dtype=torch.float64, device=device)
    if sums.numel():
        task_dots_kernel[(vectors * parts,)](
            sums,
            sums if base is None else base,
            torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(device),
            tasks,
            length,
            parts,
            BLOCK=size.block,
            DEPTH=size.depth,
            TASKS=max(16, triton.next_power_of_2(tasks)),
            ELEMENT=_ELEMENTS[tensors[0].dtype],
            HAS_BASE=base is not None,
            ALIGNED=all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
            num_warps=size.warps,
            num_stages=size.stages,
        )
    lower = sums.sum(1).tril()
    return lower + lower.tril(-1).mT
