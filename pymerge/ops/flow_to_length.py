"""Gradient flow on a relative interference loss from the mean, until the merged delta is as long as a task vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, check_task_tensors, one_thread, task_vector
from pymerge.ops._singular import eigenvectors, singular_vectors

if TYPE_CHECKING:
    from torch import Tensor

# Eigenvalues at or below this share of the largest are rounding: directions that no task vector has, where nothing
# moves. This is for tasks of one length: eigenvalues of the longest are smaller by the quotient of the n_t.
_NOISE = 1e-13
# Powers of ten of 1 / largest eigenvalue between which the time lies, for tasks of one length, and steps that halve
# what is between.
_FIRST, _LAST, _HALVINGS = -6.0, 10.0, 60
# Largest n_t over the smallest from which on eigenvalues of products are rounding where the longest task has its own,
# and over which directions of the shortest are not told from rounding themselves.
_APART, _MOST_APART = 1e4, 1e14


@dataclass(frozen=True, eq=False)
class FlowToLength(Op["Tensor"]):
    """X(s), d_out x d_in in float64: X' = -(X A - B) from the mean of the task vectors, stopped at ||X|| = length.

    A = sum_t w_t tau_t^T tau_t and B = sum_t w_t tau_t tau_t^T tau_t with w_t = 1 / n_t^2, n_t = ||tau_t||_F^2: of the
    loss sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t^2, which counts the error of each task beside the task's own change.
    The length is the root of the mean n_t. Tasks that did not touch the weight (n_t = 0) are left out. Where the
    flow never gets as long, X is where it ends.

    Source: ours; docs/method-weir.md.
    """

    summary = "gradient flow on relative errors from the mean, until it is as long as a task vector"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape and device."""
        check_task_tensors("flow_to_length", self.base, self.experts, ndim=2)

    def reference(self) -> Tensor:
        """By eigenvectors of the smaller of A and the products of all rows, on one thread."""
        import torch

        base = as_tensor(self.base)
        taus = [task_vector(base, as_tensor(expert), None, torch.float64) for expert in self.experts]
        largest = max((float(tau.abs().max()) for tau in taus if tau.numel()), default=0.0)
        if not largest > 0:
            return torch.zeros_like(base, dtype=torch.float64)
        taus = [tau.div_(largest) for tau in taus]  # so that no power of a norm leaves float64
        every = [float(tau.square().sum()) for tau in taus]
        taus = [tau for tau, norm in zip(taus, every, strict=True) if norm > 0]
        norms = [norm for norm in every if norm > 0]
        mean = torch.stack(taus).mean(dim=0)
        length = math.sqrt(math.fsum(norms) / len(norms))

        # Z^T Z = A in the unit in which its trace is the number of tasks: the time alone depends on it.
        unit = len(norms) / math.fsum(1.0 / norm for norm in norms)
        apart = min(max(norms) / min(norms), _MOST_APART)
        Z = torch.cat([tau * (math.sqrt(unit) / norm) for tau, norm in zip(taus, norms, strict=True)])
        values, V = _row_space(Z, apart)
        start = mean @ V
        residual = -start * values
        for tau, norm in zip(taus, norms, strict=True):
            residual += (tau @ tau.mT) @ (tau @ V) * (unit / norm**2)
        beside = mean - start @ V.mT  # what is too small to move

        def at(power: float) -> Tensor:
            moved: Tensor = start + residual * (-torch.expm1(-values * (10.0**power / values[-1])) / values)
            return moved

        low, high = _FIRST, _LAST + math.log10(apart)
        most = math.sqrt(max(0.0, length**2 - float(beside.square().sum())))
        if float(at(high).norm()) > most:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if float(at(middle).norm()) < most else (low, middle)
        else:
            low = high
        X: Tensor = beside.addmm_(at(low), V.mT).mul_(largest)
        return X


def _triangle(Z: Tensor) -> Tensor:
    """R of Z = Q R, on one thread."""
    import torch

    with one_thread():
        R: Tensor = torch.linalg.qr(Z, mode="r")[1]
    return R


def _row_space(Z: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of Z^T Z that are not rounding, ascending, and their eigenvectors, a column each."""
    if apart > _APART:
        _, s, Vh = singular_vectors(Z if Z.shape[0] < Z.shape[1] else _triangle(Z))
        kept = int((s.square() > _NOISE / apart * s[0].square()).sum())
        return s[:kept].flip(0).square(), Vh[:kept].flip(0).mT
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = eigenvectors(Z @ Z.mT if wide else Z.mT @ Z)
    kept = values > _NOISE * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, Z.mT @ (vectors / values.sqrt()) if wide else vectors
