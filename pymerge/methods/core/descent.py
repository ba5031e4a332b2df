"""WUDI's Adam steps on task vectors of low rank: a start in the space of the factors, and a way that leaves it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pymerge.common.arrays import Array, ArrayLike, dtype_of, rows_of
from pymerge.methods.core.deltas import Delta, Product, Run, nothing
from pymerge.methods.core.factors import Factors, row_space, total_of
from pymerge.methods.core.flow import moves, shares
from pymerge.methods.core.tall import Matrix
from pymerge.ops.combine import Combine
from pymerge.ops.low_rank_adam import BLOCK_ELEMENTS, LowRankAdam


@dataclass(frozen=True, eq=False)
class Descent:
    """scale * (X_0 + D): D of all steps is elementwise, and of full rank; its rows do not depend on each other."""

    start: Product  # X_0
    Q: Matrix  # d_in x q, of A = Q C Q^T
    C: Matrix
    P: Matrix  # d_out x q, of B_0 = P Q^T
    iterations: int
    lr: float
    scale: float

    def prepared(self, double: bool, in_axis: int) -> Descent:
        """It in the dtype of the sum; only of weights that are stored d_out x d_in, whose rows can be had alone."""
        assert in_axis == 1
        kind = np.float64 if double else self.Q.dtype
        start = Product(*(matrix.astype(np.float64 if double else np.float32) for matrix in self.start))
        Q, C, P = (np.ascontiguousarray(matrix, kind) for matrix in (self.Q, self.C, self.P))
        return replace(self, start=start, Q=Q, C=C, P=P)

    def add(self, run: Run, base: ArrayLike, first: int, out: ArrayLike) -> None:
        """See `Addend`."""
        rows, width = base.shape
        Q, C = Array.of(self.Q), Array.of(self.C)
        step = max(1, BLOCK_ELEMENTS // max(1, width))
        for top in range(0, rows, step):
            stop = min(top + step, rows)
            own = slice(first + top, first + stop)
            total = self.start.P[own] @ self.start.K
            total += run(LowRankAdam(Q, C, Array.of(self.P[own]), self.iterations, self.lr)).numpy()
            tensors = [rows_of(base, top, stop), Array.of(total)]
            run(Combine(None, tensors, [1.0, self.scale], out=rows_of(out, top, stop), out_dtype=dtype_of(out)))


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
    moved = np.concatenate(moves(space, parts))
    rms = math.sqrt(statistics.fmean(norm / math.prod(space.shape) for norm in space.norms))
    start = space.product(space.B, np.concatenate(space.L)).product()
    kind = np.float64 if double else np.float32
    Q, C, P = (matrix.astype(kind) for matrix in (space.basis.matrix(), total_of(parts), space.B.times(moved)))
    return Descent(start, Q, C, P, iterations, rate(rms), scale)
