"""task_gram: S = sum_t w_t tau~_t^T tau~_t from W_t and W_0, one launch; task vectors exist only in operand tiles.

A block computes one tile of S's lower triangle: for each task, down all rows, it loads two strips of W_t and of W_0
(the tile's rows and columns), subtracts, and multiplies. The upper triangle is the mirrored lower one: S is symmetric
to the last bit, and half the products are saved. Layers of a batch are the second axis of the grid.

What decided the tile: a step of `depth` rows of a b x b tile does 2 b^2 depth flops on 4 b depth elements of W_t and
W_0, so b / 4 flops a byte in 16 bits: 32 for b = 128, where an H100's memory would need 300 (989 Tflop/s over 3.35 TB/s
by its data sheet). The strips must therefore come from L2, which the grouped order of tiles is for. Subtracting and
splitting are a dozen operations an element, done again for each tile that reads it: that, too, asks for large tiles.

How exact the products are (DOT); sums are float32:
  split  base and experts all bfloat16, or all float16, without centring: tau (float32) = hi + lo, both 16 bits wide.
         Where lo is 0 in both strips of a step, one product on 16-bit tensor cores is exact: of bfloat16 so wherever
         weights are within a factor of two of the base's. Elsewhere hi hi + hi lo + lo hi + lo lo, as exact as hi + lo
         is: for bfloat16 up to 16 significant bits of tau (base and weight within a factor of 2^8), and within 2^-17 of
         |tau_i tau_j| beyond; for float16 within 2^-23. Without lo lo, up to 2^-18 of bfloat16 products would be lost,
         more than float32 loses in a sum, and of float16 deltas beyond that dtype's range, which lo takes, all.
  tf32   everything else: float32 by three TF32 products, within 2^-19 of |tau_i tau_j|; the weight is taken into one
         operand. Centred task vectors are here, whatever the weights' dtype: minus its mean, no tau~ fits in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Table, Variant, grouped_tile, sizes, to_bfloat16


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
def _narrow(x, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded to HALF. The interpreter can't round to bfloat16 nor multiply it: there, the same value in float32."""
    if INTERPRETED and HALF.is_bf16():
        return (to_bfloat16(x) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED:
        return x.to(HALF).to(tl.float32)
    else:
        return x.to(HALF)


@triton.jit
def _split(tau, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """(hi, lo) of tau = hi + lo. lo is 0 where hi is infinite or NaN: hi alone says so."""
    top = tau
    if HALF.is_fp16():
        # The difference of two finite float16 may exceed their range, by at most a factor of two: lo takes the rest.
        largest = tl.where(tau > 0.0, 65504.0, -65504.0)
        top = tl.where((tl.abs(tau) > 65504.0) & (tl.abs(tau) < float("inf")), largest, tau)
    hi = _narrow(top, HALF, INTERPRETED)
    wide = hi.to(tl.float32)
    lo = tl.where(tl.abs(wide) < float("inf"), tau - wide, 0.0)
    return hi, _narrow(lo, HALF, INTERPRETED)


@triton.jit
def _finite(hi):
    """hi, but 0 for infinity and NaN: times a lo of 0, infinity would turn to NaN."""
    return tl.where(tl.abs(hi.to(tl.float32)) < float("inf"), hi, 0.0)


@triton.jit
def task_gram_kernel(
    out,  # [L, columns, columns]
    base,  # [L, rows, columns]
    experts,  # T addresses of matrices like it, int64
    weights,  # [L, T] float32
    means,  # [L, T, columns] float32
    tasks,
    rows,
    columns,
    base_layer,
    base_stride,
    expert_layer,
    expert_stride,
    EXPERT: tl.constexpr,  # element type of the experts
    DOT: tl.constexpr,  # "split" or "tf32"
    CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,  # all experts start at multiples of 16 bytes
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Tile rows k and n - 1 - k of a lower triangle of n rows have n + 1 tiles together: they make one row of the grid.
    tiles = tl.cdiv(columns, BLOCK)
    pair, place = grouped_tile(tl.program_id(0), tl.cdiv(tiles, 2), tiles + 1, GROUP)
    first = place <= pair
    if (not first) & (2 * pair + 1 == tiles):
        return  # the half row that is left over when n is odd
    tile_row = tl.where(first, pair, tiles - 1 - pair)
    tile_column = tl.where(first, place, place - pair - 1)
    layer = tl.program_id(1).to(tl.int64)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    base += layer * base_layer

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for t in range(tasks):
        weight = tl.load(weights + layer * tasks + t)
        if weight != 0.0:  # of a task that is left out, not even NaN counts
            expert = tl.load(experts + t).to(tl.pointer_type(EXPERT))
            if ALIGNED:
                expert = tl.multiple_of(expert, 16)
            expert += layer * expert_layer
            mean = means + (layer * tasks + t) * columns
            gram = total
            if DOT == "split":
                gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
            for start in range(0, rows, DEPTH):
                step = start + tl.arange(0, DEPTH).to(tl.int64)
                left = _load_task(base, expert, mean, rows, columns, base_stride, expert_stride, step, row, CENTRED)
                right = _load_task(base, expert, mean, rows, columns, base_stride, expert_stride, step, column, CENTRED)
                if DOT == "split":
                    left_hi, left_lo = _split(left, base.dtype.element_ty, INTERPRETED)
                    right_hi, right_lo = _split(right, base.dtype.element_ty, INTERPRETED)
                    gram = tl.dot(tl.trans(left_hi), right_hi, gram)
                    rest = tl.max(tl.max(tl.abs(left_lo), 1), 0) + tl.max(tl.max(tl.abs(right_lo), 1), 0)
                    if rest != 0.0:
                        gram = tl.dot(tl.trans(_finite(left_hi)), right_lo, gram)
                        gram = tl.dot(tl.trans(left_lo), _finite(right_hi), gram)
                        gram = tl.dot(tl.trans(left_lo), right_lo, gram)
                else:
                    gram = tl.dot(tl.trans(weight * left), right, gram, input_precision="tf32x3")
            if DOT == "split":
                total += weight * gram
            else:
                total = gram

    out += layer * columns * columns
    wide_row = row.to(tl.int64)
    wide_column = column.to(tl.int64)
    lower = (row < columns)[:, None] & (column[None, :] <= row[:, None])
    tl.store(out + wide_row[:, None] * columns + column[None, :], total, mask=lower)
    tl.store(out + wide_column[None, :] * columns + row[:, None], total, mask=lower)


_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch(
    out: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor, means: Tensor | None, interpreted: bool
) -> None:
    """Write S, [L, d_in, d_in] float32, to `out`.

    base and experts are [L, d_out, d_in] with contiguous rows; the experts share dtype and strides. weights are [L, T]
    and means [L, T, d_in], float32 and contiguous, on the device. `interpreted`: Triton runs kernels on the CPU.
    """
    layers, rows, columns = base.shape
    if columns == 0 or layers == 0:
        return
    dtype = experts[0].dtype

    def blocks(block: int) -> int:
        tiles = triton.cdiv(columns, block)
        return triton.cdiv(tiles, 2) * (tiles + 1)

    dot = "split" if means is None and base.dtype == dtype and dtype != torch.float32 else "tf32"
    size = sizes(f"task_gram {dot}", out.device, blocks)
    addresses = torch.tensor([expert.data_ptr() for expert in experts], dtype=torch.int64).to(out.device)
    task_gram_kernel[(blocks(size.block), layers)](
        out,
        base,
        addresses,
        weights,
        out if means is None else means,
        len(experts),
        rows,
        columns,
        base.stride(0),
        base.stride(1),
        experts[0].stride(0),
        experts[0].stride(1),
        EXPERT=_ELEMENTS[dtype],
        DOT=dot,
        CENTRED=means is not None,
        ALIGNED=all(expert.data_ptr() % 16 == 0 for expert in experts),
        INTERPRETED=interpreted,
        BLOCK=size.block,
        DEPTH=size.depth,
        GROUP=size.group,
        num_warps=size.warps,
        num_stages=size.stages,
    )


# name -> base, element type of the experts, DOT, CENTRED
_VARIANTS = {
    "bf16": ("*bf16", tl.bfloat16, "split", False),
    "fp16": ("*fp16", tl.float16, "split", False),
    "fp32": ("*fp32", tl.float32, "tf32", False),
    "fp32 centred": ("*fp32", tl.float32, "tf32", True),
    "bf16 centred": ("*bf16", tl.bfloat16, "tf32", True),
    "fp16 centred": ("*fp16", tl.float16, "tf32", True),
    "fp32 base, bf16": ("*fp32", tl.bfloat16, "tf32", False),
    "bf16 base, fp32": ("*bf16", tl.float32, "tf32", False),
}


def variants(table: Table) -> Iterator[Variant]:
    """All dtypes and both products, all sizes of the most used ones."""
    for name, (base, element, dot, centred) in _VARIANTS.items():
        options = table[f"task_gram {dot}"]
        for size in options if name in ("bf16", "fp32") else options[-1:]:
            types = dict.fromkeys(("tasks", "rows", "columns"), "i32") | {"out": "*fp32", "base": base}
            types |= dict.fromkeys(("base_layer", "base_stride", "expert_layer", "expert_stride"), "i64")
            types |= {"experts": "*i64", "weights": "*fp32", "means": "*fp32"}
            constants = {"EXPERT": element, "DOT": dot, "CENTRED": centred, "ALIGNED": True, "INTERPRETED": False}
            constants |= {"BLOCK": size.block, "DEPTH": size.depth, "GROUP": size.group}
            yield Variant(f"task_gram {name} {size.block}", task_gram_kernel, types, constants, size)
