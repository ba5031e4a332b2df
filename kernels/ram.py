"""ram: W_0 + the mean of the active task vectors at each element, active where |tau_t| > epsilon, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import EXPERTS, Table, Variant, as_bits, results, sizes, store_rounded


@triton.jit
def _active(tensors, origin, offsets, mask, epsilon, t: tl.constexpr):
    """tau_t, and where it is active: NaN is, so that it is in the result."""
    tau = tl.load(tensors[t] + offsets, mask=mask, other=0.0).to(tl.float32) - origin
    return tau, mask & ((tl.abs(tau) <= epsilon) == 0)


@triton.jit
def ram_kernel(
    out,
    base,
    experts,  # tuple of T pointers, each of its own type
    factors,  # tuple of T float32: of tau_t where it alone is active
    epsilon,
    count,
    TO_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    lone = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in tl.static_range(len(experts)):
        tau, active = _active(experts, origin, offsets, mask, epsilon, t)
        total += tl.where(active, tau, 0.0)
        found += active.to(tl.float32)
        lone = tl.where(active, factors[t], lone)
    mean = tl.div_rn(total, tl.where(found < 1.0, 1.0, found))
    mean = tl.where(found == 1.0, mean * lone, mean)
    store_rounded(out, offsets, origin + mean, mask, TO_BF16)


@triton.jit
def ram_counts_kernel(
    counts,  # [T, 2, programs] int32
    base,
    experts,
    epsilon,
    count,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    origin = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for t in tl.static_range(len(experts)):
        found += _active(experts, origin, offsets, mask, epsilon, t)[1].to(tl.int32)
    programs = tl.num_programs(0)
    for t in tl.static_range(len(experts)):
        active = _active(experts, origin, offsets, mask, epsilon, t)[1]
        to = counts + 2 * t * programs + tl.program_id(0)
        tl.store(to, tl.sum((active & (found == 1)).to(tl.int32), 0))
        tl.store(to + programs, tl.sum((active & (found > 1)).to(tl.int32), 0))


def counts(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """[T, 2] int64: elements where tau_t alone is active, and where it and another are. Inputs as `launch` takes."""
    count = base.numel()
    size = sizes("elementwise", base.device, lambda block: triton.cdiv(count, block))
    programs = triton.cdiv(count, size.block)
    parts = torch.empty(len(experts), 2, programs, dtype=torch.int32, device=base.device)
    if count:
        ram_counts_kernel[(programs,)](
            parts, base, tuple(experts), float(epsilon), count, BLOCK=size.block, num_warps=size.warps
        )
    return parts.sum(-1, dtype=torch.int64)


def launch(out: Tensor, base: Tensor, experts: Sequence[Tensor], epsilon: float, factors: Sequence[float]) -> None:
    """Write the result to `out`. All contiguous, of one element count; float32, float16 or bfloat16.

    factors: T numbers, by which tau_t is multiplied where it alone is active. Without contraction: the arithmetic of
    the other backends, bit for bit.
    """
    count = out.numel()
    if count == 0:
        return
    size = sizes("elementwise", out.device, lambda block: triton.cdiv(count, block))
    ram_kernel[(triton.cdiv(count, size.block),)](
        as_bits(out),
        base,
        tuple(experts),
        tuple(float(factor) for factor in factors),
        float(epsilon),
        count,
        TO_BF16=out.dtype == torch.bfloat16,
        BLOCK=size.block,
        num_warps=size.warps,
        enable_fp_fusion=False,
    )


def variants(table: Table) -> Iterator[Variant]:
    """Experts of all dtypes, results of both kinds."""
    (size,) = table["elementwise"]
    tasks = {"base": "*bf16", "experts": EXPERTS, "count": "i64", "epsilon": "fp32"}
    for name, out, to_bf16 in results():
        types = tasks | {"out": out, "factors": ("fp32",) * 3}
        constants = {"TO_BF16": to_bf16, "BLOCK": size.block}
        yield Variant(f"ram {name}", ram_kernel, types, constants, size, contracts=False)
    yield Variant("ram_counts", ram_counts_kernel, tasks | {"counts": "*i32"}, {"BLOCK": size.block}, size)
