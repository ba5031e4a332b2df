"""routed_linear: weights mixed tile by tile in front of the product; no merged weight is written to memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import MOST_SUMMED, Table, Variant, sizes


@triton.jit
def _dot(left, right, total, UPCAST: tl.constexpr):
    """left @ right on top of total. The interpreter multiplies bfloat16 wrongly: there, in float32."""
    if UPCAST:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def mixed_kernel(
    out,  # N x M
    x,  # N x K
    weight,
    tasks,  # T of them, task_stride apart, strides as the weight's
    gates,  # G x T float32
    biases,  # G x M, in out's dtype
    tiles,  # int32 [programs, 3]: row of the gates, first and last row of x
    M,
    K,
    row_stride,  # of the weight: from one output to the next, and from one input to the next
    column_stride,
    task_stride,
    TASKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    MOST_SUMMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(M, BLOCK_M)
    tile = (tl.program_id(0) // across).to(tl.int64)
    gate = tl.load(tiles + tile * 3).to(tl.int64)
    begin = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    end = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    rows = begin + tl.arange(0, BLOCK_N).to(tl.int64)
    columns = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, MOST_SUMMED):
        part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(first, tl.minimum(first + MOST_SUMMED, K), BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
            inside = (inner < K)[:, None] & (columns < M)[None, :]
            place = columns[None, :] * row_stride + inner[:, None] * column_stride
            mixed = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            for t in range(TASKS):
                tau = tl.load(tasks + t * task_stride + place, mask=inside, other=0.0).to(tl.float32)
                mixed += tl.load(gates + gate * TASKS + t) * tau
            token = tl.load(
                x + rows[:, None] * K + inner[None, :], mask=(rows < end)[:, None] & (inner < K)[None, :], other=0.0
            )
            part = _dot(token, mixed.to(token.dtype), part, UPCAST)
        total += part
    if HAS_BIAS:
        total += tl.load(biases + gate * M + columns, mask=columns < M, other=0.0).to(tl.float32)[None, :]
    mask = (rows < end)[:, None] & (columns < M)[None, :]
    tl.store(out + rows[:, None] * M + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def factored_kernel(
    out,  # N x M
    x,  # N x K
    weight,
    tasks,
    gates,  # N x T float32: of each row of x
    biases,  # N x M
    N,
    M,
    K,
    row_stride,
    column_stride,
    task_stride,
    TASKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    MOST_SUMMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Few tokens of many samples: each task vector is read once for a tile of tokens, whosesoever they are."""
    across = tl.cdiv(M, BLOCK_M)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for t in range(-1, TASKS):
        share = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for first in range(0, K, MOST_SUMMED):
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for start in range(first, tl.minimum(first + MOST_SUMMED, K), BLOCK_K):
                inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
                inside = (inner < K)[:, None] & (columns < M)[None, :]
                place = columns[None, :] * row_stride + inner[:, None] * column_stride
                token = tl.load(
                    x + rows[:, None] * K + inner[None, :], mask=(rows < N)[:, None] & (inner < K)[None, :], other=0.0
                )
                if t < 0:
                    tile = tl.load(weight + place, mask=inside, other=0.0).to(token.dtype)
                else:
                    tile = tl.load(tasks + t * task_stride + place, mask=inside, other=0.0).to(token.dtype)
                part = _dot(token, tile, part, UPCAST)
            share += part
        gate = tl.load(gates + rows * TASKS + t, mask=(rows < N) & (t >= 0), other=1.0)
        total += gate[:, None] * share
    mask = (rows < N)[:, None] & (columns < M)[None, :]
    place = rows[:, None] * M + columns[None, :]
    if HAS_BIAS:
        total += tl.load(biases + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def programs(columns: int, block: int, tiles: int) -> tuple[int]:
    """The grid, along its one axis that takes more than 65,535 programs: tiles of rows, those of columns inside."""
    return (triton.cdiv(columns, block) * tiles,)


def launch_mixed(
    out: Tensor, x: Tensor, weight: Tensor, tasks: Tensor, gates: Tensor, biases: Tensor | None, runs: list[list[int]]
) -> None:
    """Write x_b (W_0 + sum_t g_bt tau_t)^T + bias_b to `out` for runs (row of the gates, begin, end) of rows of x.

    x, out, gates (float32) and biases (out's dtype) are contiguous; weight and each of tasks (T x M x K) may be
    transposed views of contiguous memory, both or neither.
    """
    size = sizes("routed_linear", out.device, lambda block: triton.cdiv(out.shape[1], block))
    # A tile has rows of one sample only: all of them share its mixed weight.
    tiles = [
        [gate, start, min(start + size.block, end)]
        for gate, begin, end in runs
        for start in range(begin, end, size.block)
    ]
    if not tiles or out.numel() == 0:
        return
    mixed_kernel[programs(out.shape[1], size.block, len(tiles))](
        out,
        x,
        weight,
        tasks,
        gates,
        out if biases is None else biases,
        torch.tensor(tiles, dtype=torch.int32, device=out.device),
        out.shape[1],
        x.shape[1],
        *weight.stride(),
        tasks.stride(0),
        TASKS=tasks.shape[0],
        HAS_BIAS=biases is not None,
        UPCAST=out.device.type != "cuda",
        MOST_SUMMED=MOST_SUMMED,
        BLOCK_N=size.block,
        BLOCK_M=size.block,
        BLOCK_K=size.depth,
        num_warps=size.warps,
        num_stages=size.stages,
    )


def launch_factored(
    out: Tensor, x: Tensor, weight: Tensor, tasks: Tensor, gates: Tensor, biases: Tensor | None
) -> None:
    """Write W_0 x + sum_t g_t tau_t x + bias to `out`; gates (N x T, float32) and biases (N x M) by rows of x."""
    if out.numel() == 0:
        return
    size = sizes("routed_linear", out.device, lambda block: triton.cdiv(out.shape[1], block))
    rows = 16  # the least that a tensor core takes: there are few tokens
    factored_kernel[programs(out.shape[1], size.block, triton.cdiv(len(x), rows))](
        out,
        x,
        weight,
        tasks,
        gates,
        out if biases is None else biases,
        len(x),
        out.shape[1],
        x.shape[1],
        *weight.stride(),
        tasks.stride(0),
        TASKS=tasks.shape[0],
        HAS_BIAS=biases is not None,
        UPCAST=out.device.type != "cuda",
        MOST_SUMMED=MOST_SUMMED,
        BLOCK_N=rows,
        BLOCK_M=size.block,
        BLOCK_K=size.depth,
        num_warps=size.warps,
        num_stages=size.stages,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Both forms in all dtypes."""
    (size,) = table["routed_linear"]
    more = {"M": "i32", "K": "i32", "row_stride": "i64", "column_stride": "i64", "task_stride": "i64"}
    for form, kernel, rows, own in (
        ("mixed", mixed_kernel, size.block, {"tiles": "*i32"}),
        ("factored", factored_kernel, 16, {"N": "i32"}),
    ):
        for kind in ("bf16", "fp16", "fp32"):
            types = dict.fromkeys(("out", "x", "weight", "biases"), f"*{kind}") | {"tasks": "*bf16", "gates": "*fp32"}
            constants = {"TASKS": 8, "HAS_BIAS": True, "UPCAST": False, "MOST_SUMMED": MOST_SUMMED}
            constants |= {"BLOCK_N": rows, "BLOCK_M": size.block, "BLOCK_K": size.depth}
            yield Variant(f"routed_linear {form} {kind}", kernel, types | own | more, constants, size)
