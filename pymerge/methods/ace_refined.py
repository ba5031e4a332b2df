"""ACE's closed form where tasks are heterogeneous, refined along the leading singular directions of D + X.

With Sig_t = w_t C_t^T C_t, S_t = Sig_t + e_t I and S the sum of these, X = (sum_t C_t S_t) (S + 1 c)^-1 and D = sum_t
tau_t (Sig_t - Avg), Avg = S / T.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.methods import ace_split
from pymerge.methods.ace_forms import mean_row
from pymerge.methods.actions import Run
from pymerge.methods.precision import by_rows, tell
from pymerge.methods.solver import Precision
from pymerge.methods.split_deltas import Scaled
from pymerge.ops.normal_equations import NormalEquations, outputs_first
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.spectral_refine import SpectralRefine
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

# Largest estimate of the error of refined X, as a share of its norm, with which it stays in float32: the rule has room
# for 5e-6, and the estimate is of a few random vectors.
_LARGEST_ERROR = 3e-6
# Tasks from which on the numerator in float64 takes no longer than the products of matrices of d_in x d_in.
_MANY = 12


def merged(run: Run, tasks: Scaled, k: int, precision: Precision) -> Tensor:
    """X, refined along the k leading singular directions of D + X."""
    shape, count = tasks.base.shape, len(tasks.experts)
    d_out, d_in = shape
    if precision != "auto":
        return run(SpectralRefine(*by_numerator(run, tasks, "F32" if precision == "float32" else "F64"), k)).X
    reason = "small, or many tasks"
    if _is_split((d_out, d_in), count, tasks.released):
        rows = tasks.released and by_rows(d_out, d_in, count)
        parts = ace_split.by_rows(run, tasks, k) if rows else ace_split.by_weights(run, tasks, k)
        reason = "no float32 factor"
        if parts is not None:
            X, sensitivity, margin = run(SpectralRefine(parts.X, parts.D, k))
            error = math.hypot(parts.error, sensitivity * parts.beside) / float(X.norm())
            reason = f"error estimated at {error:.2g}"
            # How far an error that is even in all directions moves a singular value, at most.
            moved = parts.beside * (1 / math.sqrt(d_out) + 1 / math.sqrt(d_in))
            if margin <= 2 * moved:
                reason = "a singular value may or may not be rounding"
            elif error <= _LARGEST_ERROR:
                tell("ace", shape, "leading directions and decomposition", reason)
                return X
            del X
        del parts
    tell("ace", shape, "all", reason)
    return run(SpectralRefine(*by_numerator(run, tasks, "F64"), k)).X


def flops(rows: int, columns: int, tasks: int, k: int, released: bool) -> int:
    """Operations, all of them counted once, in float64 or not; of eigenvectors of an n x n matrix 9 n^3, about."""
    product, (short, long) = 2 * rows * columns**2, sorted((rows, columns))
    term = long * short**2 + 4 * rows * columns * k + 9 * short**3
    if not _is_split((rows, columns), tasks, released):
        numerator = 4 * rows**2 * columns if outputs_first(rows, columns) else product
        return tasks * (product // 2 + numerator) + columns**3 // 3 + 2 * product + term
    if released and by_rows(rows, columns, tasks):
        size = tasks * rows
        return size**2 * columns + size**3 // 3 + 2 * rows * size * (size + columns) + term
    return tasks * product // 2 + columns**3 // 3 + (tasks - 1) * (2 * columns**3 + product) + term


def _is_split(shape: tuple[int, int], tasks: int, released: bool) -> bool:
    """Whether the deltas of such a weight are split where precision is `auto`."""
    return min(shape) >= ace_split.LEAST and ((released and by_rows(*shape, tasks)) or tasks < _MANY)


def scratch(rows: int, columns: int, tasks: int, released: bool) -> int:
    """Bytes beside inputs and output, at most."""
    size = rows * columns
    # By the numerator: covariance, system, factor, one task's Gram, or eigenvectors and LAPACK's work; numerator,
    # solution, total, residual and four temporaries, in float64.
    most = 8 * (6 * columns**2 + 8 * size)
    if not _is_split((rows, columns), tasks, released):
        return most
    return max(most, ace_split.scratch(rows, columns, tasks, released))


def by_numerator(run: Run, tasks: Scaled, dtype: str) -> tuple[Tensor, Tensor]:
    """X and D by the numerator sum_t C_t S_t, all in this dtype."""
    base, experts, means, weights = tasks.base, tasks.experts, tasks.means, tasks.weights
    ridges, count = list(tasks.ridges), len(tasks.experts)
    system, numerator = run(NormalEquations(base, experts, weights, means, None, dtype, ridges))
    prior = (system.sum(dim=0) - sum(ridges)) / (system.shape[0] * tasks.divisor)
    row = mean_row(run, base, experts, means, weights, dtype)
    right = numerator
    if not tasks.released:  # the released numerator has the centred deltas; the paper's, the deltas
        right = numerator + (row + row.new_tensor(ridges) @ means.to(row.dtype))
    X = run(SpdSolve(system, right, prior, sum(ridges))).X
    average = system / count
    if not tasks.released:  # the paper's has no ridge in it
        average.diagonal().sub_(sum(ridges) / count)
    D = numerator + row
    D -= run(TaskSum(base, experts, ridges, means, dtype))
    D.addmm_(run(TaskSum(base, experts, [1.0] * count, dtype=dtype)), average, alpha=-1.0)
    return X, D
