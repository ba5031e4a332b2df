"""Right-hand division by a symmetric positive definite matrix, with an optional rank-one term. Never an inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pymerge.common.arrays import dtype_of
from pymerge.errors import ArgumentError
from pymerge.ops._cholesky import Cholesky, LibraryCholesky, factorise, not_positive_definite
from pymerge.ops._op import Op, times_vector

if TYPE_CHECKING:
    from torch import Tensor

# Steps of the power iterations behind the condition number.
ITERATIONS = 8


class Solution(NamedTuple):
    """X of X (S + 1 c) = R, and how far S amplifies errors."""

    X: Tensor  # d_out x d_in, or a batch of such
    # Estimate of the 2-norm condition number of S, within a small factor, from below; of a batch [L], float64, CPU.
    # With a `ridge` it may be that of the largest eigenvalue over it.
    condition: float | Tensor


@dataclass(frozen=True, eq=False)
class SpdSolve(Op[Solution]):
    """X of X S = R, or of X (S + 1 c) = R with 1 a column of ones.

    The rank-one term is applied by Sherman-Morrison: X = Y - (R u)(c S^-1) / (1 + c u), Y = R S^-1, u = S^-1 1.
    A batch of L systems of one size has one more dimension in front. What a layer gives does not depend on the others.

    Source: ACE-Merging, arXiv 2603.02945, closed form.
    """

    summary = "X S = R by Cholesky, with ACE's rank-one prior by Sherman-Morrison"

    S: Tensor  # d_in x d_in, symmetric positive definite, float32 or float64; or [L, d_in, d_in]
    R: Tensor  # d_out x d_in, same dtype; or [L, d_out, d_in]
    prior: Tensor | None = None  # c, [d_in], same dtype; or [L, d_in]
    ridge: float | None = None  # what no eigenvalue of S is below, if that is known: the condition costs no solves then

    def check(self) -> None:
        """Raise ArgumentError unless S is d_in x d_in, R d_out x d_in and c a row of d_in, or batches of such."""
        S, R, prior = self.S, self.R, self.prior
        if R.ndim not in (2, 3) or (R.ndim == 3 and len(R) == 0):
            raise ArgumentError(
                f"spd_solve: the right-hand side has shape {tuple(R.shape)}, expected a matrix, "
                "or a batch of at least one"
            )
        *layers, _, columns = R.shape
        if tuple(S.shape) != (*layers, columns, columns):
            raise ArgumentError(f"spd_solve: S has shape {tuple(S.shape)}, expected {(*layers, columns, columns)}")
        if prior is not None and tuple(prior.shape) != (*layers, columns):
            raise ArgumentError(f"spd_solve: the prior has shape {tuple(prior.shape)}, expected {(*layers, columns)}")
        dtypes = {S.dtype, R.dtype} | ({prior.dtype} if prior is not None else set())
        if len(dtypes) > 1 or dtype_of(S) not in ("F32", "F64"):
            raise ArgumentError(f"spd_solve: dtypes {sorted(map(str, dtypes))}; all must be float32, or all float64")
        if self.ridge is not None and not self.ridge > 0:
            raise ArgumentError(f"spd_solve: ridge is {self.ridge}; give a number above 0, or None")

    @property
    def like(self) -> Tensor:
        """R: the work is a layer's, d_out x d_in."""
        return self.R

    def reference(self) -> Solution:
        """One Cholesky factorisation and d_out + 2 right-hand sides, the same bits for any number of threads.

        Raises ArgumentError when S is not positive definite.
        """
        import torch

        S, R, prior = self.S, self.R, self.prior
        if S.ndim == 2:
            X, condition, minor = _solve(S, R, prior, self.ridge)
            return Solution(X, settle(S, condition, minor))
        solved = [_solve(S[i], R[i], None if prior is None else prior[i], self.ridge, i) for i in range(len(S))]
        X, conditions, minors = (torch.stack(parts) for parts in zip(*solved, strict=True))
        return Solution(X, settle(S, conditions, minors))


def start_vector(S: Tensor) -> Tensor:
    """The vector that power iterations start from, of length 1: fixed, so that estimates are the same on every run."""
    import torch

    start = torch.cos(torch.arange(1, S.shape[-1] + 1, dtype=S.dtype, device=S.device))
    return start.div_(start.norm())


def power_iteration(S: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of S, float64 on its device, from below."""
    import torch

    vector, largest = start_vector(S).unsqueeze(0), S.new_ones(())
    if S.numel() == 0:
        return largest.double()
    for _ in range(ITERATIONS):
        vector = vector @ S
        largest = vector.norm()
        vector = vector / largest.clamp(min=torch.finfo(S.dtype).tiny)
    return largest.double()


def condition_estimate(S: Tensor, factor: Cholesky | LibraryCholesky) -> Tensor:
    """Estimate cond_2(S), float64 on S's device, from its factor by power iteration on S and S^-1, d_in^2 work each."""
    low, smallest_inverse = start_vector(S).unsqueeze(0), S.new_ones(())
    for _ in range(ITERATIONS):
        low = factor.solve(low)
        smallest_inverse = low.norm()
        low = low / smallest_inverse
    return power_iteration(S) * smallest_inverse.double()


def settle(S: Tensor, conditions: Tensor, minors: Tensor) -> float | Tensor:
    """The `condition` of a Solution from what a device has computed, which is waited for here, once.

    Args:
        S: the system or batch of systems.
        conditions, minors: one number, or [L] of a batch; a minor that is not 0 is the size of the first leading minor
            that is not positive, and raises ArgumentError.
    """
    import torch

    both = torch.stack([conditions.double(), minors.double()]).cpu()
    for layer, minor in enumerate(both[1].reshape(-1).tolist()):
        if minor:
            raise not_positive_definite(S, int(minor), layer if S.ndim == 3 else None)
    return both[0] if S.ndim == 3 else float(both[0])


def _solve(
    S: Tensor, R: Tensor, prior: Tensor | None, ridge: float | None, layer: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, condition, minor) of one system, on its device and without waiting for it."""
    import torch

    if S.shape[0] == 0:
        return R.clone(), torch.ones((), device=S.device), torch.zeros((), device=S.device)
    factor = factorise(S, layer)
    X = factor.solve(R)
    if prior is not None:
        pair = factor.solve(torch.stack([torch.ones_like(prior), prior]))
        u, row = pair[0], pair[1]
        X -= torch.outer(times_vector(R, u), row) / (1.0 + prior @ u)
    condition = condition_estimate(S, factor) if ridge is None else power_iteration(S) / ridge
    return X, condition, factor.minor
