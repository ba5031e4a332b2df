"""SCE: select the elements that differ most between models, weigh tasks by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_task_tensors, compute_dtype, one_thread
from pymerge.ops.selection import kth_smallest

# Elements that are upcast at once.
BLOCK = 2**18


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    select_topk: float = 1.0,
    least_energy: float = 0.0,
    least_weight: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
    check_task_tensors("sce", base, experts)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"sce: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    select_topk: float = 1.0,
    least_energy: float = 0.0,
    least_weight: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W_0 + sum_t w_t keep_t tau_t / sum_t w_t keep_t.

    Args:
        base: W_0, any shape, floating point.
        experts: T tensors W_t like it.
        select_topk: below 1, only the int(select_topk * m) elements with the largest variance over the models are
            merged, m the number of those whose variance is not 0; of equal ones the first.
        least_energy: weights are 1/T where the energies add up to less, and where they add up to 0.
        least_weight: lower limit of the divisor. Where no task is kept the base stays.
        out_dtype: dtype of the result; default: the base's.

    keep_t: tau_t is not 0 and has the sign of sum_t tau_t (plus for 0). w_t: mean of tau_t^2 over the tensor, selected
    elements only, divided by the sum over tasks. In float32 (float64 if an input is), energies in float64.
    Source: FuseChat-3.0, arXiv 2408.07990; mergekit.
    """
    dtype = compute_dtype(base, *experts)
    selected = None
    if select_topk < 1.0:
        spread = torch.empty(base.numel(), dtype=dtype, device=base.device)
        for here, _, taus in _blocks(base, experts, dtype, None):
            mean = _sum_in_order(taus).div_(len(experts))
            spread[here] = _sum_in_order((taus - mean).square_()).div_(len(experts))
        selected = most_varied(spread, select_topk)
    energies = torch.zeros(len(experts), dtype=torch.float64, device=base.device)
    with one_thread():
        for _, _, taus in _blocks(base, experts, dtype, selected):
            energies += taus.to(torch.float64).square_().sum(-1)
    weights = task_weights((energies / max(1, base.numel())).tolist(), least_energy)
    merged = torch.empty(base.numel(), dtype=out_dtype or base.dtype, device=base.device)
    for here, origin, taus in _blocks(base, experts, dtype, selected):
        positive = _sum_in_order(taus) >= 0.0
        total, divisor = torch.zeros_like(origin), torch.zeros_like(origin)
        for tau, weight in zip(taus, weights, strict=True):
            kept = torch.where(positive, tau > 0.0, tau < 0.0).to(dtype).mul_(weight)
            total.add_(tau * kept)  # NaN stays, whatever its weight
            divisor.add_(kept)
        divisor = divisor.clamp(min=least_weight)
        merged[here] = origin + total / torch.where(divisor == 0.0, 1.0, divisor)
    return merged.view(base.shape)


def task_weights(energies: Sequence[float], least_energy: float) -> list[float]:
    """Energies divided by their sum; equal weights where that is 0 or less than `least_energy`."""
    total = sum(energies)
    if total == 0.0 or total < least_energy:
        return [1.0 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


def most_varied(spread: Tensor, share: float) -> Tensor:
    """True for the largest of the variances [n], int(share * m) of them where m are not 0; `spread` is written to."""
    spread.abs_()  # not even NaN has a sign
    count = int(int(torch.count_nonzero(spread)) * share)
    if count <= 0:
        return torch.zeros_like(spread, dtype=torch.bool)
    least = kth_smallest(spread, len(spread) - count)
    chosen = spread > least
    equal = (spread == least).nonzero().squeeze(-1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen


def _sum_in_order(taus: Tensor) -> Tensor:
    """The sum over tasks, one after the other."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    return total


def _blocks(
    base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype, selected: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Place, W_0 and task vectors [T, n], 0 where not selected, of a few elements after the other."""
    origin, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for at in range(0, len(origin), BLOCK):
        here = slice(at, at + BLOCK)
        start = origin[here].to(dtype, copy=True)
        taus = torch.stack([each[here].to(dtype) - start for each in flat])
        yield here, start, taus if selected is None else taus.mul_(selected[here])


OP = Op("sce", check, reference, "elements that differ most between models, weighted by energy, majority sign")
