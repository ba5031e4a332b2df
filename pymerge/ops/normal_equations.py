"""Normal equations of the interference loss: the matrices that WUDI descends on and ACE solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.ops import task_gram
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_matrix, compute_dtype, task_vector


class NormalEquations(NamedTuple):
    """X A = B is the stationarity condition of sum_t w_t ||(X - tau_t) tau~_t^T||_F^2."""

    A: Tensor  # d_in x d_in, symmetric positive semi-definite
    B: Tensor  # d_out x d_in; relative to `origin` when one was given


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    origin: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ridges: Sequence[float] | None = None,
) -> None:
    """Raise ArgumentError unless matrices, weights, means, origin and ridges agree."""
    task_gram.check(base, experts, weights, means, dtype)
    if ridges is not None:
        check_length("normal_equations", "ridges", ridges, len(experts))
    if origin is not None:
        check_matrix("normal_equations", "origin", origin, (base.shape[0], base.shape[1]))


def outputs_first(rows: int, columns: int) -> bool:
    """True if (L tau^T) tau costs less than L (tau^T tau), whose Gram is needed for A anyway.

    2 d_out^2 d_in more for the first product against a Gram that A shares: worth it when d_in > 2 d_out.
    """
    return columns > 2 * rows


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    origin: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ridges: Sequence[float] | None = None,
) -> NormalEquations:
    """Return A = sum_t (w_t G_t + e_t I) and B = sum_t (tau~_t - O) (w_t G_t + e_t I), with G_t = tau~_t^T tau~_t.

    Args:
        base, experts, weights, means, dtype: as in `task_gram`.
        origin: O, d_out x d_in, or None for 0. With an origin, B = B_0 - O A, but formed from the small differences
            tau~_t - O and not as the difference of two large products: exactly 0 where O = tau~_t.
        ridges: T numbers e_t, or None for 0.

    Source: gradient 2 (X A - B) of the loss of WUDI-Merging, arXiv 2503.08099; with ridges, numerator and denominator
    of ACE-Merging, arXiv 2603.02945.
    """
    dtype = dtype or compute_dtype(base, *experts)
    rows, columns = base.shape
    A = torch.zeros(columns, columns, dtype=dtype, device=base.device)
    B = torch.zeros(rows, columns, dtype=dtype, device=base.device)
    ridges = [0.0] * len(experts) if ridges is None else ridges
    for index, (expert, weight, ridge) in enumerate(zip(experts, weights, ridges, strict=True)):
        if weight == 0.0 and ridge == 0.0:
            continue
        tau = task_vector(base, expert, None if means is None else means[index], dtype)
        left = tau if origin is None else tau - origin.to(dtype)
        if outputs_first(rows, columns):
            A.addmm_(tau.mT, tau, alpha=weight)
            B.addmm_(left @ tau.mT, tau, alpha=weight)
        else:
            gram = tau.mT @ tau
            A.add_(gram, alpha=weight)
            B.addmm_(left, gram, alpha=weight)
        if ridge != 0.0:
            B.add_(left, alpha=ridge)
    A.diagonal().add_(sum(ridges))
    return NormalEquations(A, B)


OP = FunctionOp("normal_equations", check, reference, "A and B of the interference loss, one task at a time")
