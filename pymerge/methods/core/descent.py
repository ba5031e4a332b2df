"""WUDI's Adam steps on task vectors of low rank: a start in the space of the factors, and a way that leaves it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pymerge.methods.core.factors import Delta, Factors, Product, Run, nothing, row_space
from pymerge.methods.core.flow import moves, shares
from pymerge.ops.low_rank_adam import LowRankAdam

# Elements of the rows that all steps are made on, one after the other: so few that they stay in the cache.
BLOCK_ELEMENTS = 2**16


@dataclass(frozen=True, eq=False)
class Descent:
    """scale * (X_0 + D): D of all steps is elementwise, and of full rank; its rows do not depend on each other."""

    start: Product  # X_0
    Q: Tensor  # d_in x q, of A = Q C Q^T
    C: Tensor
    P: Tensor  # d_out x q, of B_0 = P Q^T
    iterations: int
    lr: float
    scale: float

    def prepared(self, dtype: torch.dtype, in_axis: int) -> Delta:
        """It in the dtype of the sum; only of weights that are stored d_out x d_in, whose rows can be had alone."""
        assert in_axis == 1
        steps = torch.promote_types(self.Q.dtype, dtype)
        Q, C, P = (matrix.to(steps).contiguous() for matrix in (self.Q, self.C, self.P))
        return replace(self, start=self.start.prepared(dtype, in_axis), Q=Q, C=C, P=P)

    def rows(self, run: Run, first: int, last: int, out: Tensor) -> Tensor:
        """Write rows `first` to `last` to `out`."""
        self.start.rows(run, first, last, out)
        step = max(1, BLOCK_ELEMENTS // max(1, out.shape[1]))
        for top in range(first, last, step):
            P = self.P[top : min(top + step, last)]
            out[top - first : top - first + len(P)] += run(LowRankAdam(self.Q, self.C, P, self.iterations, self.lr))
        return out.mul_(self.scale)


def descent(
    tasks: Sequence[Factors], iterations: int, rate: Callable[[float], float], scale: float, double: bool
) -> Delta:
    """Adam from the sum of the task vectors; `rate` gives lr from the root mean square of those that are not zero.

    A and B_0 are formed in float64; steps are float32 unless `double`, or where the result is float64.
    """
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    parts = shares(space)
    moved = torch.cat(moves(space, parts))
    rms = math.sqrt(statistics.fmean(norm / math.prod(space.shape) for norm in space.norms))
    start = space.product(space.joined, torch.cat(space.L))
    dtype = torch.float64 if double else torch.float32
    Q, C, P = (matrix.to(dtype) for matrix in (space.Q, torch.stack(parts).sum(dim=0), space.joined @ moved))
    return Descent(start, Q, C, P, iterations, rate(rms), scale)
