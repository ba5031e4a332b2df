"""Filters on the eigenvectors of A: gradient flow for a time, or the exact step, on the leading directions only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops._singular import Matrix, eigenvectors, functions, in_double
from pymerge.ops.gradient_flow import check_system

if TYPE_CHECKING:
    from torch import Tensor

# Eigenvalues below it count as this much, as in the released code.
FLOOR = 1e-8
# Times machine precision and d_in: eigenvalues below this share of the largest are rounding, and are never divided by.
RANK_SLACK = 4.0

Rank = float | Literal["participation_sqrt"]


@dataclass(frozen=True, eq=False)
class SpectralFilter(Op["Tensor"]):
    """The displacement D = B V diag(h / lambda) V^T over the K leading eigenvectors of A = V diag(lambda) V^T.

    Source: SWUDI and SWUDI-A, arXiv 2606.07289, exponential and hard filters.
    """

    summary = "spectral filters on the normal equations, by eigenvectors"

    A: Tensor  # d_in x d_in, symmetric positive semi-definite, float32 or float64, from `normal_equations`
    B: Tensor  # d_out x d_in, same dtype, relative to the start X_0 (`origin` of `normal_equations`)
    time: float  # t of h = 1 - e^{-lambda t}; infinity for h = 1, the exact minimiser in those directions
    rank: Rank  # how many directions, see `kept`; for t infinite, never more than the numerical rank of A
    columns: int | None = None  # of the weight, where A is smaller: eigenvalues that it lacks are 0, and count for K

    def check(self) -> None:
        """Raise ArgumentError unless A and B fit, time is at least 0 (or infinity) and rank a share in (0, 1]."""
        check_system("spectral_filter", self.A, self.B)
        if not self.time >= 0:
            raise ArgumentError(f"spectral_filter: time is {self.time}; give at least 0, or infinity")
        rank = self.rank
        if rank != "participation_sqrt" and not (isinstance(rank, float) and 0 < rank <= 1):
            raise ArgumentError(
                f"spectral_filter: rank is {rank!r}; give a share above 0 up to 1, or 'participation_sqrt'"
            )
        if self.columns is not None and self.columns < len(self.A):
            raise ArgumentError(
                f"spectral_filter: {self.columns} columns for {len(self.A)} rows of A; give at least these"
            )

    @property
    def like(self) -> Tensor:
        """B: the work is a layer's, d_out x d_in."""
        return self.B

    def reference(self) -> Tensor:
        """By LAPACK's eigenvectors on one thread: the same bits for any number of threads."""
        import torch

        A, B, time = self.A, self.B, self.time
        if A.numel() == 0:
            return torch.zeros_like(B)
        values, vectors = eigenvectors(A)
        leading = filter_gain(values, time, self.rank, len(A) if self.columns is None else self.columns)
        count = int((leading != 0).sum())
        gain, basis = leading[len(leading) - count :], vectors[:, len(leading) - count :]
        displacement: Tensor = (B @ basis * gain) @ basis.mT
        return displacement


def filter_gain(values: Tensor, time: float, rank: Rank, columns: int) -> Tensor:
    """h / lambda on the eigenvalues of A (ascending); there are `columns` of them, with zeros that are not listed.

    0 but for the leading directions, never of those that are noise where the time is infinite.
    """
    import torch

    size = values.numel()
    count = min(size, kept(torch.cat([values.new_zeros(columns - size), values]), rank))
    if math.isinf(time):
        noise = RANK_SLACK * torch.finfo(values.dtype).eps * columns * float(values[-1])
        count = min(count, int((values > noise).sum()))
    leading = values[size - count :].clamp(min=FLOOR)
    gain = torch.zeros_like(values)
    gain[size - count :] = 1.0 / leading if math.isinf(time) else -torch.expm1(-leading * time) / leading
    return gain


def kept(values: Matrix, rank: Rank) -> int:
    """K, the number of leading directions of the eigenvalues (any order) that a rank rule keeps, at least 1.

    A share rho keeps floor(d_in rho + 0.999). "participation_sqrt" keeps ceil((sum a)^2 / sum a^2) with a the square
    roots of the eigenvalues: how many directions would carry the same norm if all carried alike.
    """
    size = len(values)
    if rank != "participation_sqrt":
        return min(size, max(1, math.floor(size * rank + 0.999)))
    xp = functions(values)
    roots = xp.sqrt(xp.clip(in_double(values), FLOOR, None))
    return min(size, max(1, math.ceil(float(roots.sum() ** 2 / (roots * roots).sum()))))
