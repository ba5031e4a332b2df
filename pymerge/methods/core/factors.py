"""Task vectors as products of factors, tau_t = B_t A_t, and the row space that all of them lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pymerge.ops._op import Op

# Runs an op on the chosen backend.
Run = Callable[[Op[Tensor]], Tensor]

# A product whose norm is below this share of its factors' is rounding: its columns cancel each other.
_ROUNDING = 1e-14


class Factors(NamedTuple):
    """tau_t = B A of a linear weight, d_out x d_in; of rank 0 where the task did not touch it."""

    B: Tensor  # d_out x r, float64
    A: Tensor  # r x d_in, float64

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def finite(self) -> bool:
        """Whether neither factor holds NaN or infinity."""
        return bool(self.B.isfinite().all()) and bool(self.A.isfinite().all())


class Delta(Protocol):
    """scale * X of a weight, which nobody forms as a whole."""

    def prepared(self, dtype: torch.dtype, in_axis: int) -> Delta:
        """It in the dtype of the sum with W_0, for rows as they are stored."""

    def rows(self, run: Run, first: int, last: int, out: Tensor) -> Tensor:
        """Write rows `first` to `last` to `out`, contiguous and of that dtype, which is returned; of what is prepared.

        Whoever asks for the same rows at once gets the same bits.
        """


class Product(NamedTuple):
    """X = P K, scales in K."""

    P: Tensor  # d_out x k
    K: Tensor  # k x d_in

    def times(self, scale: float) -> Product:
        """scale * X."""
        return Product(self.P, self.K * scale)

    def whole(self) -> Tensor:
        """X, d_out x d_in."""
        return self.P @ self.K

    def prepared(self, dtype: torch.dtype, in_axis: int) -> Product:
        """See `Delta`."""
        left, right = (self.K.mT, self.P.mT) if in_axis == 0 else (self.P, self.K)
        return Product(left.to(dtype).contiguous(), right.to(dtype).contiguous())

    def rows(self, run: Run, first: int, last: int, out: Tensor) -> Tensor:
        """See `Delta`."""
        return torch.mm(self.P[first:last], self.K, out=out)


@dataclass(frozen=True, eq=False)
class RowSpace:
    """tau_t = B_t L_t Q^T of the tasks that are not zero, with orthonormal columns Q, d_in x q, q <= d_in.

    Q spans the rows of all A_t, those of zero tasks too, and `beside`, rows that were asked for: beside = U Q^T.
    """

    shape: tuple[int, int]  # (d_out, d_in)
    B: tuple[Tensor, ...]  # of each task d_out x r_t
    L: tuple[Tensor, ...]  # of each task r_t x q
    Q: Tensor
    norms: tuple[float, ...]  # n_t, squared Frobenius norms, above 0
    U: Tensor  # rows x q, of `beside`

    def __len__(self) -> int:
        """Number of tasks that are not zero."""
        return len(self.B)

    @property
    def joined(self) -> Tensor:
        """[B_1 .. B_T], d_out x R."""
        return torch.cat(self.B, dim=1)

    def grams(self, B: Sequence[Tensor]) -> list[Tensor]:
        """L_t^T (B_t^T B_t) L_t of each task, q x q."""
        return [L.mT @ (left.mT @ left) @ L for left, L in zip(B, self.L, strict=True)]

    def product(self, P: Tensor, core: Tensor) -> Product:
        """X = P core Q^T."""
        return Product(P, core @ self.Q.mT)

    def only(self, kept: Sequence[int]) -> RowSpace:
        """The same space with some of its tasks."""
        B, L = (tuple(part[t] for t in kept) for part in (self.B, self.L))
        return replace(self, B=B, L=L, norms=tuple(self.norms[t] for t in kept))


def row_space(tasks: Sequence[Factors], beside: Tensor | None = None) -> RowSpace:
    """The space of the rows of all tasks, finite, of one shape; `beside`: further rows (float64) that it contains."""
    shape = tasks[0].shape
    rows = tasks[0].A.new_empty(0, shape[1]) if beside is None else beside
    Q, R = torch.linalg.qr(torch.cat([*(task.A for task in tasks), rows]).mT)
    *L, U = R.mT.split([*(len(task.A) for task in tasks), len(rows)])
    norms = [float(((task.B.mT @ task.B @ part) * part).sum()) for task, part in zip(tasks, L, strict=True)]
    kept = [t for t, task in enumerate(tasks) if norms[t] > (_ROUNDING * float(task.B.norm() * task.A.norm())) ** 2]
    B = tuple(tasks[t].B for t in kept)
    return RowSpace(shape, B, tuple(L[t] for t in kept), Q, tuple(norms[t] for t in kept), U)


def nothing(shape: tuple[int, int]) -> Product:
    """X = 0."""
    return Product(torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64))


def plain_sum(tasks: Sequence[Factors], weight: float = 1.0) -> Product:
    """X = weight * sum_t tau_t."""
    return Product(torch.cat([task.B for task in tasks], dim=1), torch.cat([task.A for task in tasks])).times(weight)
