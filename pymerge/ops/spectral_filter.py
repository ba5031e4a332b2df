"""Filters on the eigenvectors of A: gradient flow for a time, or the exact step, on the leading directions only."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops import gradient_flow
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_matrix, one_thread

# Eigenvalues below it count as this much, as in the released code.
_FLOOR = 1e-8
# Times machine precision and d_in: eigenvalues below this share of the largest are rounding, and are never divided by.
_RANK_SLACK = 4.0

Rank = float | Literal["participation_sqrt"]


def check(A: Tensor, B: Tensor, time: float, rank: Rank) -> None:
    """Raise ArgumentError unless A and B fit, time is at least 0 (infinity allowed) and rank a share in (0, 1]."""
    gradient_flow.check(A, B, 0.0 if math.isinf(time) and time > 0 else time)
    check_matrix("spectral_filter", "A", A, (B.shape[1], B.shape[1]))
    if rank != "participation_sqrt" and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ArgumentError(f"spectral_filter: rank is {rank!r}; give a share above 0 up to 1, or 'participation_sqrt'")


def kept(values: Tensor, rank: Rank) -> int:
    """K, the number of leading directions of the eigenvalues (any order) that a rank rule keeps, at least 1.

    A share rho keeps floor(d_in rho + 0.999). "participation_sqrt" keeps ceil((sum a)^2 / sum a^2) with a the square
    roots of the eigenvalues: how many directions would carry the same norm if all carried alike.
    """
    size = values.numel()
    if rank != "participation_sqrt":
        return min(size, max(1, math.floor(size * rank + 0.999)))
    roots = values.to(torch.float64).clamp(min=_FLOOR).sqrt()
    return min(size, max(1, math.ceil(float(roots.sum() ** 2 / roots.square().sum()))))


def reference(A: Tensor, B: Tensor, time: float, rank: Rank) -> Tensor:
    """Return the displacement D = B V diag(h / lambda) V^T over the K leading eigenvectors of A = V diag(lambda) V^T.

    Args:
        A: d_in x d_in, symmetric positive semi-definite, float32 or float64, from `normal_equations`.
        B: d_out x d_in, same dtype, relative to the start X_0 (`origin` of `normal_equations`).
        time: t of h = 1 - e^{-lambda t}; infinity for h = 1, the exact minimiser in those directions.
        rank: how many directions, see `kept`. For t infinite, never more than the numerical rank of A.

    Source: SWUDI and SWUDI-A, arXiv 2606.07289, exponential and hard filters.
    """
    if A.numel() == 0:
        return torch.zeros_like(B)
    with one_thread():
        values, vectors = torch.linalg.eigh(A)
    count = kept(values, rank)
    if math.isinf(time):
        noise = _RANK_SLACK * torch.finfo(A.dtype).eps * A.shape[0] * float(values[-1])
        count = min(count, int((values > noise).sum()))
    leading = values[values.numel() - count :].clamp(min=_FLOOR)
    basis = vectors[:, vectors.shape[1] - count :]
    gain = 1.0 / leading if math.isinf(time) else -torch.expm1(-leading * time) / leading
    displacement: Tensor = (B @ basis * gain) @ basis.mT
    return displacement


OP = FunctionOp("spectral_filter", check, reference, "spectral filters on the normal equations, by eigenvectors")
