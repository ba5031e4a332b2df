"""Truncation of a product of two factors to a lower rank, exactly, without forming it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError
from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Times the larger side and the largest singular value: float64's rounding, below which there is no direction.
_EPS = 2.0**-52


@dataclass(frozen=True)
class Truncated:
    """B A of a lower rank, and what was lost: `kept` and `lost` are sums of s^2."""

    B: Tensor
    A: Tensor
    kept: float
    lost: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.B.shape[1])


def truncate(B: Tensor, A: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of B A in the Frobenius norm, in float64.

    B = Q_b R_b and A^T = Q_a R_a; the singular values of the R x R core R_b R_a^T are those of B A. Both factors get
    the square roots of those that are kept. Without `rank` and `energy` nothing is lost but directions that are zero.

    Args:
        B: d_out x R.
        A: R x d_in.
        rank: most singular values to keep, at least 1.
        energy: in (0, 1]: the smallest number of them that has this share of the sum of s^2.
    """
    import torch

    if rank is not None and rank < 1:
        raise ArgumentError(f"rank is {rank}; give at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ArgumentError(f"energy is {energy}; give a share above 0 and at most 1")
    with one_thread():
        Qb, Rb = torch.linalg.qr(B.to(torch.float64))
        Qa, Ra = torch.linalg.qr(A.to(torch.float64).mT)
        U, s, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
        squares = s * s
        kept = int((s > max(Qb.shape[0], Qa.shape[0]) * _EPS * s[:1]).sum()) if len(s) else 0
        if energy is not None:
            kept = min(kept, enough(squares, energy * float(squares.sum())))
        kept = min(kept, rank) if rank is not None else kept
        root = s[:kept].sqrt()
        left, right = (Qb @ U[:, :kept]) * root, root[:, None] * (Vh[:kept] @ Qa.mT)
    return Truncated(left, right, float(squares[:kept].sum()), float(squares[kept:].sum()))


def enough(squares: Tensor, wanted: float) -> int:
    """Number of the numbers, in their order, that have a sum of at least `wanted`; all where none do."""
    reached = squares.cumsum(0) >= wanted
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares)
