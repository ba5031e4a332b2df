"""Deltas of several tasks as thin products along their leading directions, in float64, and rests in float32.

C_t = P_t V^T + F_t: V (d_in x h) holds about the leading directions of all tasks, P_t = C_t V. Products with the F_t
have errors beside what these are, not beside the C_t. What they are is measured on random vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.actions import Run
from pymerge.ops._op import one_thread
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

# Columns of V, rows of each task that it is found from, and products that it takes.
COLUMNS, _ROWS, _ROUNDS = 128, 1024, 3
# Random vectors that the norm of an error is measured on.
_PROBES = 8
# Rows of a float32 matrix that are taken to float64 at once.
_BLOCK = 512


@dataclass(frozen=True)
class Scaled:
    """A weight to merge: the deltas of T tasks, their column means, and what scales their covariances."""

    base: Tensor
    experts: Sequence[Tensor]
    means: Tensor  # mu_t, [T, d_in]
    weights: Sequence[float]  # w_t
    ridges: Sequence[float]  # e_t
    divisor: float  # of c, beside the column mean of sum_t Sig_t
    released: bool  # else the paper's: tau_t in place of C_t in X, and Avg without ridges

    def delta(self, run: Run, t: int) -> Tensor:
        """C_t in float64."""
        return run(TaskSum(self.base, [self.experts[t]], [1.0], self.means[t : t + 1], "F64"))


class Split:
    """Matrices C_t as P_t V^T + F_t, which almost vanishes on the columns of V."""

    def __init__(self, basis: Tensor, thin: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
        self.basis = basis  # V, d_in x h, orthonormal, float64
        self.thin = thin  # P_t, m x h, float64
        self.rest = rest  # F_t, m x d_in, float32

    @classmethod
    def of(cls, run: Run, tasks: Scaled, k: int) -> Split:
        """The centred deltas of all tasks, with fewer columns of V than are kept in the refinement."""
        basis = _leading(run, tasks, max(1, min(COLUMNS, 4 * k // 5)))
        thin, rest = [], []
        for t in range(len(tasks.experts)):
            delta = tasks.delta(run, t)
            thin.append(delta @ basis)
            rest.append(delta.addmm_(thin[t], basis.mT, alpha=-1.0).float())
        return cls(basis, thin, rest)

    def apart(self, t: int, other: int) -> Split:
        """The difference of two of them alone."""
        return Split(self.basis, [self.thin[t] - self.thin[other]], [self.rest[t] - self.rest[other]])

    def times(self, t: int, vectors: Tensor) -> Tensor:
        """C_t times some vectors, d_in x p in float64."""
        return times(self.thin[t], times(self.basis.mT, vectors)).add_(times(self.rest[t], vectors))

    def gram(self, run: Run, t: int, zeros: Tensor) -> Tensor:
        """C_t^T C_t in float64, but for F_t^T F_t; `zeros` is as F_t."""
        F, thin = self.rest[t], self.thin[t]
        gram = run(TaskGram(zeros, [F], [1.0], None, "F32")).double()
        between = (thin.mT @ thin).mul_(0.5) @ self.basis.mT
        for start in range(0, len(F), _BLOCK):
            between.addmm_(thin[start : start + _BLOCK].mT, F[start : start + _BLOCK].double())
        return gram.addmm_(self.basis, between).addmm_(between.mT, self.basis.mT)

    def after(self, vectors: Tensor) -> Tensor:
        """C_0 times more than a few vectors, all but P_0 V^T in float32."""
        found = (self.rest[0] @ vectors.float()).double()
        return found.addmm_(self.thin[0], self.basis.mT @ vectors)

    def before(self, L: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """L C_0 in float64, and its error on the probes."""
        found = (L.float() @ self.rest[0]).double()
        defect = times(found, probes).sub_(times(L, times(self.rest[0], probes)))
        return found.addmm_(L @ self.thin[0], self.basis.mT), defect

    def add_product(self, out: Tensor, R: Tensor, probes: Tensor) -> Tensor:
        """Add C_0 R, R being overwritten; returns what was added on the probes."""
        image = self.basis.mT @ R
        out.addmm_(self.thin[0].to(out.dtype), image.to(out.dtype))
        R.addmm_(self.basis, image, alpha=-1.0)
        product = self.rest[0] @ R.float()
        out.add_(product)
        return times(product, probes).add_(times(self.thin[0], times(image, probes)))

    def norm(self) -> float:
        """The norm of C_0."""
        return math.hypot(float(self.thin[0].norm()), float(self.rest[0].norm()))


def _leading(run: Run, tasks: Scaled, count: int) -> Tensor:
    """V of so many columns: about the leading directions of the rows of all sqrt(w_t) C_t, by some of them."""
    import torch

    base = tasks.base
    some = slice(None, None, -(-base.shape[0] // _ROWS))
    Z = torch.cat(
        [
            run(TaskSum(base[some], [expert[some]], [weight**0.5], tasks.means[t : t + 1], "F32"))
            for t, (expert, weight) in enumerate(zip(tasks.experts, tasks.weights, strict=True))
        ]
    )
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(base.shape[1], count, generator=generator).to(base.device)
    for _ in range(_ROUNDS):
        basis = orthonormal(Z.mT @ (Z @ basis))
    return orthonormal(basis.double())


def orthonormal(M: Tensor) -> Tensor:
    """An orthonormal basis of the columns."""
    import torch

    with one_thread():
        basis: Tensor = torch.linalg.qr(M)[0]
    return basis


def times(M: Tensor, vectors: Tensor) -> Tensor:
    """M times few vectors in float64, M in float32 or float64: on one thread, as such products round differently for
    each number of them."""
    import torch

    with one_thread():
        if M.dtype == vectors.dtype:
            return M @ vectors
        parts = [M[start : start + _BLOCK].double() @ vectors for start in range(0, len(M), _BLOCK)]
        return torch.cat(parts)


def probes_for(basis: Tensor) -> Tensor:
    """Random vectors, always the same ones, d_in x 2 p in float64: p whole ones, and p without their parts along V."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(basis), 2 * _PROBES, generator=generator, dtype=torch.float64).to(basis.device)
    beside = found[:, _PROBES:]
    beside -= times(basis, times(basis.mT, beside))
    return found


def norm_of(images: Tensor) -> float:
    """The Frobenius norm of a matrix, from its products with whole random vectors, which come first."""
    return float(images[:, :_PROBES].norm()) / math.sqrt(_PROBES)


def norms_of(images: Tensor, leading: Tensor) -> tuple[float, float]:
    """The norm of an error, from its products with the probes, and that without the directions of `leading` and V."""
    U = orthonormal(leading)
    beside = images[:, _PROBES:]
    beside = beside - times(U, times(U.mT, beside))
    return norm_of(images), float(beside.norm()) / math.sqrt(_PROBES)
