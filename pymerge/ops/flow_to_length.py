"""Gradient flow on a relative interference loss from the mean, until the merged delta is as long as a task vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, check_task_tensors, task_vector
from pymerge.ops._singular import eigenvectors

if TYPE_CHECKING:
    from torch import Tensor

# An n_t below this share of their mean counts as it: errors of a task that hardly touched the weight would weigh
# without bound beside its own change, and X be next to nothing.
SHORTEST = 1 / 16
# Eigenvalues at or below this share of the largest are rounding: directions where nothing moves.
_NOISE = 1e-13
# Powers of ten of 1 / largest eigenvalue between which the time lies, and steps that halve what is between.
_FIRST, _LAST, _HALVINGS = -6.0, 10.0, 60


@dataclass(frozen=True, eq=False)
class FlowToLength(Op["Tensor"]):
    """X(s), d_out x d_in in float64: X' = -(X A - B) from the mean of the task vectors, stopped at ||X|| = length.

    A = sum_t w_t tau_t^T tau_t and B = sum_t w_t tau_t tau_t^T tau_t with w_t = 1 / n_t^2, n_t = ||tau_t||_F^2: of the
    loss sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t^2, which counts the error of each task beside the task's own change;
    an n_t below a sixteenth of their mean counts as that there. The length is the root of the mean n_t. Tasks that did
    not touch the weight (n_t = 0) are left out. Where the flow never gets as long, X is where it ends.

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
        square = math.fsum(norms) / len(norms)  # of the length

        # Z^T Z = A in the unit in which its largest weight is 1: the time alone depends on it.
        weights = [1.0 / max(norm, SHORTEST * square) ** 2 for norm in norms]
        weights = [weight / max(weights) for weight in weights]
        Z = torch.cat([tau * math.sqrt(weight) for tau, weight in zip(taus, weights, strict=True)])
        values, V = _row_space(Z)
        start = mean @ V
        residual = -start * values
        for tau, weight in zip(taus, weights, strict=True):
            residual += (tau @ tau.mT) @ (tau @ V) * weight
        beside = mean - start @ V.mT  # what does not move

        def at(power: float) -> Tensor:
            moved: Tensor = start + residual * (-torch.expm1(-values * (10.0**power / values[-1])) / values)
            return moved

        low, high = _FIRST, _LAST
        most = math.sqrt(max(0.0, square - float(beside.square().sum())))
        if float(at(high).norm()) > most:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if float(at(middle).norm()) < most else (low, middle)
        else:
            low = high
        X: Tensor = beside.addmm_(at(low), V.mT).mul_(largest)
        return X


def _row_space(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of Z^T Z that are not rounding, ascending, and their eigenvectors, a column each."""
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = eigenvectors(Z @ Z.mT if wide else Z.mT @ Z)
    kept = values > _NOISE * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, Z.mT @ (vectors / values.sqrt()) if wide else vectors
