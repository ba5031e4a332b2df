"""Reinforced Agent Merging: the mean of the task vectors that touch an element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_task_tensors, compute_dtype

# Elements that are upcast at once.
BLOCK = 2**20


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    r: float = 0.0,
    alpha: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("ram", base, experts)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"ram: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    r: float = 0.0,
    alpha: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W_0 + the mean of the active tau_t at each element; tau_t is active where |tau_t| > epsilon.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        epsilon: size up to which an element of tau_t counts as untouched.
        r, alpha: where tau_t alone is active it is multiplied by 1 + r min(s_t / u_t, alpha), u_t the number of such
            elements of the tensor and s_t that of elements where tau_t and another are active.
        out_dtype: dtype of the result; default: the base's.

    In float32 (float64 if an input is), in the order of `experts`, rounded once at the end. Source: arXiv 2601.13572.
    """
    dtype = compute_dtype(base, *experts)
    merged = torch.empty(base.numel(), dtype=out_dtype or base.dtype, device=base.device)
    factors = lone_factors(lone_and_shared(base, experts, epsilon, dtype), r, alpha) if r else None
    for here, origin, taus, active, count in _blocks(base, experts, epsilon, dtype):
        total = torch.zeros_like(origin)
        for index, tau in enumerate(taus):
            total.add_(torch.where(active[index], tau, 0.0))
        total.div_(count.clamp(min=1))
        if factors is not None:
            for index, factor in enumerate(factors):
                total = torch.where(active[index] & (count == 1), total * factor, total)
        merged[here] = origin.add_(total)
    return merged.view(base.shape)


def lone_and_shared(base: Tensor, experts: Sequence[Tensor], epsilon: float, dtype: torch.dtype) -> list[list[int]]:
    """[u_t, s_t] of each task."""
    counts = torch.zeros(len(experts), 2, dtype=torch.int64, device=base.device)
    for _, _, _, active, count in _blocks(base, experts, epsilon, dtype):
        counts[:, 0] += (active & (count == 1)).sum(-1)
        counts[:, 1] += (active & (count > 1)).sum(-1)
    found: list[list[int]] = counts.tolist()
    return found


def lone_factors(counts: Sequence[Sequence[int]], r: float, alpha: float) -> list[float]:
    """1 + r min(s_t / u_t, alpha) of each task; 1 where u_t is 0, and nothing is multiplied."""
    return [1.0 + r * min(shared / lone, alpha) if lone else 1.0 for lone, shared in counts]


def _blocks(
    base: Tensor, experts: Sequence[Tensor], epsilon: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Place, W_0, task vectors [T, n], where they are active and how many are, of a few elements after the other."""
    origin, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for at in range(0, len(origin), BLOCK):
        here = slice(at, at + BLOCK)
        start = origin[here].to(dtype, copy=True)
        taus = torch.stack([each[here].to(dtype) - start for each in flat])
        # A NaN is active, so that it is in the result.
        active = ~(taus.abs() <= epsilon)
        yield here, start, taus, active, active.sum(0)


OP = Op("ram", check, reference, "mean of the task vectors that touch an element")
