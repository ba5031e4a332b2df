"""Right-hand division by a symmetric positive definite matrix, with an optional rank-one term. Never an inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_matrix
from pymerge.ops.cholesky import Cholesky


class Solution(NamedTuple):
    """X of X (S + 1 c) = R, and how far S amplifies errors."""

    X: Tensor  # d_out x d_in
    condition: float  # estimate of the 2-norm condition number of S, within a small factor, from below


def check(S: Tensor, R: Tensor, prior: Tensor | None = None) -> None:
    """Raise ArgumentError unless S is d_in x d_in, R d_out x d_in and the prior a row of d_in."""
    if R.ndim != 2:
        raise ArgumentError(f"spd_solve: the right-hand side has shape {tuple(R.shape)}, expected a matrix")
    check_matrix("spd_solve", "S", S, (R.shape[1], R.shape[1]))
    if prior is not None and tuple(prior.shape) != (R.shape[1],):
        raise ArgumentError(f"spd_solve: the prior has shape {tuple(prior.shape)}, expected ({R.shape[1]},)")
    dtypes = {S.dtype, R.dtype} | ({prior.dtype} if prior is not None else set())
    if len(dtypes) > 1 or S.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"spd_solve: dtypes {sorted(map(str, dtypes))}; all must be float32, or all float64")


def condition_estimate(S: Tensor, factor: Cholesky, iterations: int = 8) -> float:
    """Estimate cond_2(S) from its factor by power iteration on S and on S^-1, d_in^2 work each.

    The start vector is fixed, so the estimate is the same on every run.
    """
    size = S.shape[0]
    start = torch.cos(torch.arange(1, size + 1, dtype=S.dtype, device=S.device)).unsqueeze(0)
    high = low = start / start.norm()
    largest = smallest_inverse = 0.0
    for _ in range(iterations):
        high = high @ S
        largest = float(high.norm())
        high = high / largest
        low = factor.solve(low)
        smallest_inverse = float(low.norm())
        low = low / smallest_inverse
    return largest * smallest_inverse


def reference(S: Tensor, R: Tensor, prior: Tensor | None = None) -> Solution:
    """Solve X S = R, or X (S + 1 c) = R with 1 a column of ones, for X.

    Args:
        S: d_in x d_in, symmetric positive definite, float32 or float64.
        R: d_out x d_in, same dtype.
        prior: c, [d_in], same dtype, or None. The rank-one term is applied by Sherman-Morrison:
            X = Y - (R u)(c S^-1) / (1 + c u), Y = R S^-1, u = S^-1 1.

    One Cholesky factorisation and d_out + 2 right-hand sides, the same bits for any number of threads.
    Raises ArgumentError when S is not positive definite. Source: ACE-Merging, arXiv 2603.02945, closed form.
    """
    if S.shape[0] == 0:
        return Solution(R.clone(), 1.0)
    factor = Cholesky(S)
    X = factor.solve(R)
    if prior is not None:
        pair = factor.solve(torch.stack([torch.ones_like(prior), prior]))
        u, row = pair[0], pair[1]
        X -= torch.outer(R @ u, row) / (1.0 + prior @ u)
    return Solution(X, condition_estimate(S, factor))


OP = Op("spd_solve", check, reference, "X S = R by Cholesky, with ACE's rank-one prior by Sherman-Morrison")
