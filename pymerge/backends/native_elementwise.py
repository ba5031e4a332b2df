"""C++ forms of the ops that go element by element through task vectors: nearswap, ram, sce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.ops.base import compute_dtype
from pymerge.ops.nearswap import LEAST_DIFFERENCE
from pymerge.ops.ram import lone_factors
from pymerge.ops.sce import most_varied, task_weights


class _Tasks:
    """Contiguous inputs, and what csrc/bindings takes for them."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        self.base = base.contiguous()
        self.experts = [expert.contiguous() for expert in experts]
        self.dtype = compute_dtype(base, *experts)

    @property
    def argument(self) -> tuple[int, int, list[int], list[int], int]:
        return (
            self.base.data_ptr(),
            DTYPE_CODES[self.base.dtype],
            [expert.data_ptr() for expert in self.experts],
            [DTYPE_CODES[expert.dtype] for expert in self.experts],
            self.base.numel(),
        )


def _output(like: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, tuple[int, int]]:
    out = torch.empty(like.shape, dtype=dtype or like.dtype)
    return out, (out.data_ptr(), DTYPE_CODES[out.dtype])


def nearswap(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """`nearswap` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks = _Tasks(base, [expert])
    _C.nearswap(target, tasks.argument, t, LEAST_DIFFERENCE, torch.get_num_threads())
    return out


def ram(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    r: float = 0.0,
    alpha: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ram` in one pass, with r in two; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks, threads = _Tasks(base, experts), torch.get_num_threads()
    factors: list[float] = []
    if r:
        counts = torch.empty(len(experts), 2, dtype=torch.int64)
        _C.ram_counts(counts.data_ptr(), tasks.argument, epsilon, threads)
        factors = lone_factors(counts.tolist(), r, alpha)
    _C.ram(target, tasks.argument, epsilon, factors, threads)
    return out


def sce(
    base: Tensor,
    experts: Sequence[Tensor],
    select_topk: float = 1.0,
    least_energy: float = 0.0,
    least_weight: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sce` in a pass for the energies and one for the result; one more, and the selection, where not all is merged."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks, threads = _Tasks(base, experts), torch.get_num_threads()
    selected = None
    if select_topk < 1.0:
        spread = torch.empty(base.numel(), dtype=tasks.dtype)
        _C.sce_spread(spread.data_ptr(), tasks.argument, threads)
        selected = most_varied(spread, select_topk)
    mask = 0 if selected is None else selected.data_ptr()
    energies = torch.empty(len(experts), dtype=torch.float64)
    _C.sce_energies(energies.data_ptr(), tasks.argument, mask, threads)
    weights = task_weights((energies / max(1, base.numel())).tolist(), least_energy)
    _C.sce(target, tasks.argument, mask, weights, least_weight, threads)
    return out
