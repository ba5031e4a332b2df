"""The rule of `precision: auto` for closed forms: float32 where its result is as good as float64's, rounded.

Of 1,000 elements of a merged tensor at most one may differ from the float64 merge rounded once, and by no more than one
unit in the last place; elements whose error is below 2e-5 of the root mean square of X don't count. An error of X of
5e-6 of its norm keeps that in bfloat16, float16 and float32, however small or large the deltas are: then five standard
deviations of the error are about that size. Errors grow with what a solver amplifies, whose limits are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.common.events import event
from pymerge.methods.actions import Run
from pymerge.ops._op import times_vector
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

# Largest ||A|| t at which gradient flow on d_in x d_in matrices is float32: errors of X grow in proportion to it.
FLOW_SCALE = 100.0
# The longest time at which it is on products of rows, where errors are small whatever the eigenvalues are.
FLOW_TIME = 500.0
# Largest condition numbers of ACE's system up to which all is float32, all but its solves, and all but these and its
# Gram matrices. Errors grow in proportion; where the system is of products of rows they are much smaller, as rounding
# does not reach directions that no delta has. The last product alone loses something there only, by the square root.
ACE_CONDITIONS = (60.0, 60.0, math.inf)
ACE_CONDITIONS_OF_ROWS = (3500.0, 6000.0, 1e5)

# Multiply-adds of the Gram matrices of a weight that is merged in float64 without an estimate.
_SMALL = 2**22
# Rows of each task that the estimate reads: the leading directions of deltas show in them.
_ROWS = 2048
_ITERATIONS = 6


def tell(method: str, shape: Sequence[int], double: str, reason: str) -> None:
    """Log what `precision: auto` has chosen for a weight: which parts of the work are `double`, the others float32."""
    size = " x ".join(map(str, shape))
    text = f"{method}: {size}, in float64: {double or 'nothing'} ({reason})"
    event("precision_chosen", text, method=method, shape=list(shape), float64=double, reason=reason)


def small(rows: int, columns: int, tasks: int) -> bool:
    """Whether a weight is so small that float64 costs less than to decide."""
    return tasks * rows * columns**2 <= _SMALL


def by_rows(rows: int, columns: int, tasks: int) -> bool:
    """Whether products of all rows of the tasks are the smaller matrix: T d_out below d_in."""
    return tasks * rows < columns


def largest_eigenvalue(
    run: Run,
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    norms: Sequence[float],
    means: Tensor | None = None,
) -> float:
    """Estimate the largest eigenvalue of sum_t w_t tau~_t^T tau~_t from some rows, before any product is formed.

    Args:
        norms: ||tau~_t||_F^2, which tell whether these rows stand for all: infinity where they don't.
        means: [T, d_in] to subtract.
    """
    import torch

    some = slice(None, None, -(-base.shape[0] // _ROWS))
    share = len(base[some]) / base.shape[0]
    parts = []
    for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        shift = None if means is None else means[t : t + 1]
        parts.append(run(TaskSum(base[some], [expert[some]], [math.sqrt(weight)], shift, "F32")))
    Z = torch.cat(parts)
    expected = sum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    seen = float(Z.norm()) ** 2 / share
    if not seen > expected / 2:
        return math.inf if expected > 0 else 0.0
    vector, largest = times_vector(Z.mT, torch.cos(torch.arange(1, len(Z) + 1, dtype=Z.dtype, device=Z.device))), 0.0
    for _ in range(_ITERATIONS):
        vector = times_vector(Z.mT, times_vector(Z, vector / vector.norm()))
        largest = float(vector.norm())
    return largest / share
