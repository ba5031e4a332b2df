"""ResMerge: residuals behind each task's leading singular direction averaged, longer where they agree."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._blocks import sum_in_order
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, one_thread, task_vector
from pymerge.ops._power import leading_triplet

if TYPE_CHECKING:
    from torch import Tensor

# Of the released form: keeps quotients finite, and is what counts as nothing.
_TINY = 1e-8


@dataclass(frozen=True, eq=False)
class Resmerge(Op["Tensor"]):
    """X = A + B, d_out x d_in, float32 (float64 if any input is), computed in float64.

    tau_t = H_t + R_t, H_t its leading singular component. A is the mean of the R_t, or where they agree their mean
    direction q, c^beta * mean ||R_t|| long, with c the mean cosine of R_t and q, and beta between `largest` and
    `least`, the smaller the more they agree. B is the mean of the H_t, brought to the share `head` S of ||A||, S the
    mean positive cosine of two H_t. One task alone is its task vector; of weights with one row or column, which leave
    no residual, X is the mean.

    Source: ResMerge, arXiv 2606.02252, as in sunyd0303-cpu/ResMerge-release for weights of attention and of MLPs.
    """

    summary = "residuals behind leading singular directions, longer where they agree (ResMerge)"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    largest: float = 1.0  # beta where residuals disagree
    least: float = 0.7  # beta where they are the same
    head: float = 0.2

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape and the exponents are in order."""
        check_task_tensors("resmerge", self.base, self.experts, ndim=2)
        if not 0 <= self.least <= self.largest:
            raise ArgumentError(
                f"resmerge: the exponents are {self.least:g} and {self.largest:g}; give 0 <= least <= largest"
            )
        if not self.head >= 0:
            raise ArgumentError(f"resmerge: head is {self.head:g}; give at least 0")

    def reference(self) -> Tensor:
        """One leading triplet a task, and inner products of pairs; sums on one thread, which decide lengths."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        dtype = compute_dtype(base, *experts)
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
        if len(taus) == 1 or min(base.shape) <= 1:
            mean = sum_in_order(torch.stack(taus)) / len(taus)
            return mean.to(dtype)
        heads = [leading_triplet(tau) for tau in taus]
        mean_head = torch.zeros_like(taus[0])
        for tau, (u, s, v) in zip(taus, heads, strict=True):
            tau.addr_(u * s, v, alpha=-1.0)
            mean_head.addr_(u * s, v, alpha=1.0 / len(taus))
        with one_thread():
            X = self._residual(taus)
            length, size, agreement = float(X.norm()), float(mean_head.norm()), _agreement(heads)
        if min(length, size, agreement) >= _TINY:
            X.add_(mean_head, alpha=self.head * agreement * length / size)
        return X.to(dtype)

    def _residual(self, residuals: Sequence[Tensor]) -> Tensor:
        """A."""
        tasks, norms = len(residuals), [float(R.norm()) for R in residuals]
        total = residuals[0] / (norms[0] + _TINY)
        for R, norm in zip(residuals[1:], norms[1:], strict=True):
            total.add_(R, alpha=1.0 / (norm + _TINY))
        size = float(total.norm())
        agreement = statistics.fmean(_cosine(R, total, norm * size) for R, norm in zip(residuals, norms, strict=True))
        agreement = min(max(agreement, 0.0), 1.0)
        if size <= _TINY or agreement <= 1.0 / math.sqrt(tasks) * (1.0 + 1e-12):
            mean = residuals[0] / tasks
            for R in residuals[1:]:
                mean.add_(R, alpha=1.0 / tasks)
            return mean
        pairs = itertools.combinations(range(tasks), 2)
        alike = statistics.fmean(_cosine(residuals[i], residuals[j], norms[i] * norms[j]) for i, j in pairs)
        score = ((alike + 1.0) / 2.0 + (agreement + 1.0) / 2.0) / 2.0
        beta = self.largest - (self.largest - self.least) * score
        return total.mul_(agreement**beta * statistics.fmean(norms) / size)


def _cosine(one: Tensor, two: Tensor, norms: float) -> float:
    """Cosine of two matrices, given the product of their norms; 0 of one that is 0."""
    return float((one * two).sum()) / norms if norms > 0.0 else 0.0


def _agreement(heads: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean positive cosine of two leading components."""
    return statistics.fmean(
        max(0.0, float(one[0] @ two[0]) * float(one[2] @ two[2])) for one, two in itertools.combinations(heads, 2)
    )
