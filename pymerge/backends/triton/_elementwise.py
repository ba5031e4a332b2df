"""Triton kernels for inner products of models, and for what goes element by element: combine_vectors, nearswap, ram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.triton._routed import on
from pymerge.ops.nearswap import LEAST_DIFFERENCE


def nearswap(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """`nearswap` in one pass, with the arithmetic of the C++ backend."""
    from pymerge.kernels import nearswap as kernel

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    with on(base.device):
        kernel.launch(out, base.contiguous(), expert.contiguous(), t, LEAST_DIFFERENCE)
    return out


def ram(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ram` in one pass, with the arithmetic of the C++ backend."""
    from pymerge.kernels import ram as kernel

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    with on(base.device):
        kernel.launch(out, base, inputs, epsilon, [1.0] * len(inputs) if factors is None else list(factors))
    return out


def ram_counts(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """`ram_counts` in one pass."""
    from pymerge.kernels import ram as kernel

    with on(base.device):
        counts: Tensor = kernel.counts(base.contiguous(), [expert.contiguous() for expert in experts], epsilon)
    return counts
