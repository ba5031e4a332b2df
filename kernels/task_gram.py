"""task_gram: S = sum_t w_t tau~_t^T tau~_t from W_t and W_0; task vectors exist only in a tile's operands."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._common import sizes


@triton.jit
def _load_task(base, expert, mean, rows, columns, base_stride, stride, row, column, CENTRED: tl.constexpr):
    """tau~ in float32 at the given rows and columns, and 0 outside the matrix."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(expert + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    origin = tl.load(base + row[:, None] * base_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tau = value - origin
    if CENTRED:
        shift = tl.load(mean + column, mask=column < columns, other=0.0)
        tau = tl.where(mask, tau - shift[None, :], 0.0)
    return tau


@triton.jit
def task_gram_kernel(
    out,
    base,
    experts,  # tuple of T pointers, each of its own type
    weights,  # tuple of T float32
    strides,  # tuple of T row strides
    means,
    rows,
    columns,
    base_stride,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Tile rows k and n - 1 - k of the lower triangle make one row of the grid, n + 1 wide.
    tiles = tl.cdiv(columns, BLOCK)
    pair = tl.program_id(1)
    place = tl.program_id(0)
    first = place <= pair
    if (not first) & (2 * pair + 1 == tiles):
        return  # the half row that is left over when n is odd
    tile_row = tl.where(first, pair, tiles - 1 - pair).to(tl.int64)
    tile_column = tl.where(first, place, place - pair - 1).to(tl.int64)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for t in tl.static_range(len(experts)):
        mean = means + t * columns  # T d_in stays far below 2^31
        gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, rows, DEPTH):
            step = start + tl.arange(0, DEPTH).to(tl.int64)
            left = _load_task(base, experts[t], mean, rows, columns, base_stride, strides[t], step, row, CENTRED)
            right = _load_task(base, experts[t], mean, rows, columns, base_stride, strides[t], step, column, CENTRED)
            gram = tl.dot(tl.trans(left), right, gram, input_precision="ieee")
        total += weights[t] * gram

    # Both triangles come from the lower one, so S is symmetric to the last bit.
    lower = (row < columns)[:, None] & (column[None, :] <= row[:, None])
    tl.store(out + row[:, None] * columns + column[None, :], total, mask=lower)
    tl.store(out + column[None, :] * columns + row[:, None], total, mask=lower)


def launch(
    out: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], means: Tensor | None
) -> None:
    """Write S (float32, contiguous) to `out`. Rows of base and experts are contiguous; means are float32."""
    rows, columns = base.shape
    if columns == 0:
        return
    block, depth, warps = sizes("task_gram", out.device)
    tiles = triton.cdiv(columns, block)
    task_gram_kernel[(tiles + 1, triton.cdiv(tiles, 2))](
        out,
        base,
        tuple(experts),
        tuple(float(weight) for weight in weights),
        tuple(expert.stride(0) for expert in experts),
        out if means is None else means,
        rows,
        columns,
        base.stride(0),
        CENTRED=means is not None,
        BLOCK=block,
        DEPTH=depth,
        num_warps=warps,
    )
