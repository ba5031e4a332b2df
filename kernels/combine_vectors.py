"""combine_vectors: sum_t w_gt W_t, or W_0 + sum_t w_gt (W_t - W_0), weights for each row or column, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, as_bits, results, sizes, store_rounded


@triton.jit
def combine_vectors_kernel(
    out,  # [rows, columns], as base and tensors
    base,
    tensors,  # tuple of T pointers, each of its own type
    weights,  # [T, rows] or, BY_COLUMNS, [T, columns] float32
    rows,
    columns,
    HAS_BASE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    TO_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    place = tl.program_id(0)
    row = (place // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (place % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    if HAS_BASE:
        origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        origin = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = origin
    of_task = tl.cast(columns if BY_COLUMNS else rows, tl.int64)  # those of all may be more than 32 bits count
    for t in tl.static_range(len(tensors)):
        value = tl.load(tensors[t] + offsets, mask=mask, other=0.0).to(tl.float32)
        if BY_COLUMNS:
            weight = tl.load(weights + t * of_task + column, mask=column < columns, other=0.0)[None, :]
        else:
            weight = tl.load(weights + t * of_task + row, mask=row < rows, other=0.0)[:, None]
        total += (value - origin) * weight
    store_rounded(out, offsets, total, mask, TO_BF16)


def launch(out: Tensor, base: Tensor | None, tensors: Sequence[Tensor], weights: Tensor, by_columns: bool) -> None:
    """Write the result to `out`.

    out, base and tensors: [rows, columns], contiguous; float32, float16 or bfloat16. weights: [T, rows] or, with
    `by_columns`, [T, columns], float32, contiguous.
    """
    rows, columns = out.shape
    if out.numel() == 0:
        return
    size = sizes("elementwise", out.device, lambda block: triton.cdiv(out.numel(), block))
    wide = min(size.block, triton.next_power_of_2(columns))
    high = size.block // wide
    combine_vectors_kernel[(triton.cdiv(rows, high) * triton.cdiv(columns, wide),)](
        as_bits(out),
        out if base is None else base,
        tuple(tensors),
        weights,
        rows,
        columns,
        HAS_BASE=base is not None,
        BY_COLUMNS=by_columns,
        TO_BF16=out.dtype == torch.bfloat16,
        ROWS=high,
        COLUMNS=wide,
        num_warps=size.warps,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, results of both kinds."""
    (size,) = table["elementwise"]
    for name, out, to_bf16 in results():
        types = {"out": out, "base": "*bf16", "tensors": EXPERTS, "weights": "*fp32", "rows": "i32", "columns": "i32"}
        constants = {"HAS_BASE": to_bf16, "BY_COLUMNS": to_bf16, "TO_BF16": to_bf16}
        constants |= {"ROWS": 4, "COLUMNS": size.block // 4}
        yield Variant(f"combine_vectors {name}", combine_vectors_kernel, types, constants, size)
