"""ACE's closed form where tasks are not heterogeneous, in three ways of computing it: each weight's cheapest is taken.

X = (sum_t C_t S_t) (S + 1 c)^-1, S_t = C_t^T C_t + e I, S = sum_t S_t, c the column mean of sum_t C_t^T C_t. With the
last task as origin, (X - C_T) S = sum_t (C_t - C_T) S_t before the rank-one term: one task less is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.common.dtypes import torch_dtype
from pymerge.methods.actions import Run
from pymerge.methods.precision import by_rows
from pymerge.ops._op import times_vector
from pymerge.ops.normal_equations import NormalEquations, outputs_first
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.stacked_gram import StackedGram
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["rows", "weights", "numerator"]

# Time of a float64 product over that of a float32 one, about, on CPUs.
_DOUBLE = 2


def cheapest(rows: int, columns: int, tasks: int, double: bool, plain: bool = True) -> Form:
    """Cheapest form of X, with the system in float64 or not; `plain`: its rows are in the span of the deltas'."""
    if plain and by_rows(rows, columns, tasks):
        return "rows"
    costs = {form: flops(form, rows, columns, tasks, _DOUBLE if double else 1) for form in ("weights", "numerator")}
    return "weights" if costs["weights"] < costs["numerator"] else "numerator"


def flops(form: str, rows: int, columns: int, tasks: int, factor: int = 1) -> int:
    """Operations, those of the system times a factor."""
    product = 2 * rows * columns**2
    if form == "rows":
        size = tasks * rows
        return factor * (size**2 * columns + size**3 // 3 + 2 * rows * size**2) + 2 * rows * size * columns
    system = tasks * product // 2 + columns**3 // 3
    if form == "weights":
        return factor * (system + 2 * (tasks - 1) * columns**3) + (tasks - 1) * product
    numerator = 4 * rows**2 * columns if outputs_first(rows, columns) else product
    return factor * (system + tasks * numerator + product)


def scratch(rows: int, columns: int, tasks: int) -> int:
    """Bytes beside inputs and output, at most, all of it in float64."""
    if by_rows(rows, columns, tasks):  # Z, also in float32; K, its factor, a temporary; coefficients; X and its like
        size = tasks * rows
        return 8 * (2 * size * columns + 3 * size**2 + 3 * rows * size + 4 * rows * columns)
    # Grams and what becomes of them, the system, its factor, one Gram; X, a delta, and their like.
    return 8 * ((2 * tasks + 4) * columns**2 + 8 * rows * columns)


@dataclass(frozen=True)
class Tasks:
    """A weight to merge: the deltas of T tasks, their column means [T, d_in], and the ridge e of each."""

    base: Tensor
    experts: Sequence[Tensor]
    means: Tensor
    eps: float

    @property
    def ridge(self) -> float:
        """T e, below which no eigenvalue of S is."""
        return len(self.experts) * self.eps


def by_products_of_rows(run: Run, tasks: Tasks, grams: str, system: str, products: str) -> tuple[Tensor, float]:
    """X by the Gram matrix K = Z Z^T of all rows of all C_t: (X - C_T) is J (K + T e I)^-1 Z before the rank-one term.

    K is formed in `grams`, and (K + T e I)^-1 applied in `system`. Returns the condition number, too.
    """
    import torch

    base, count, last = tasks.base, len(tasks.experts), len(tasks.experts) - 1
    rows, columns = base.shape
    Z, K = run(StackedGram(base, tasks.experts, [1.0] * count, tasks.means, grams))
    K = K.to(torch_dtype(system))
    blocks = [slice(t * rows, (t + 1) * rows) for t in range(count)]
    J = torch.zeros(rows + 1, len(K), dtype=K.dtype, device=K.device)
    for here in blocks[:last]:  # (C_t - C_T) C_t^T + e I, and -e I beside it
        J[:rows, here] = K[here, here] - K[blocks[last], here]
        J[:rows, here].diagonal().add_(tasks.eps)
        J[:rows, blocks[last]].diagonal().sub_(tasks.eps)
    J[rows] = times_vector(Z, Z.new_ones(columns)) / columns  # c in terms of Z
    K.diagonal().add_(tasks.ridge)
    coefficients, condition = run(SpdSolve(K, J, ridge=tasks.ridge))
    del K, J
    dtype = torch_dtype(products)
    Z = Z.to(dtype)
    moved = coefficients.to(dtype) @ Z
    return with_prior(moved[:rows] + Z[blocks[last]], moved[rows]), float(condition)


def by_weights(run: Run, tasks: Tasks, system: str, products: str, row: Tensor | None) -> tuple[Tensor, float]:
    """X - C_T = sum_t (C_t - C_T) (S_t S^-1): matrices of d_in x d_in in `system`, one product a task in `products`.

    `row` is added to each row of the numerator. Returns the condition number, too.
    """
    base, experts, means, last = tasks.base, tasks.experts, tasks.means, len(tasks.experts) - 1
    columns = base.shape[1]
    S = run(TaskGram(base, [experts[last]], [1.0], means[last:], system))
    right = S.new_empty(last * columns + (1 if row is None else 2), columns)
    for t in range(last):
        gram = run(TaskGram(base, [experts[t]], [1.0], means[t : t + 1], system))
        S.add_(gram)
        gram.diagonal().add_(tasks.eps)
        right[t * columns : (t + 1) * columns] = gram
    right[last * columns] = S.sum(dim=0) / columns
    if row is not None:
        right[-1] = row
    S.diagonal().add_(tasks.ridge)
    shares, condition = run(SpdSolve(S, right, ridge=tasks.ridge))
    del S, right
    shares = shares.to(torch_dtype(products))
    X = run(TaskSum(base, [experts[last]], [1.0], means[last:], products))
    for t in range(last):
        apart = run(TaskSum(base, [experts[t], experts[last]], [1.0, -1.0], means[[t, last]], products))
        X.addmm_(apart, shares[t * columns : (t + 1) * columns])
    if row is not None:
        X.add_(shares[-1])
    return with_prior(X, shares[last * columns]), float(condition)


def by_numerator(run: Run, tasks: Tasks, system: str, row: Tensor | None) -> tuple[Tensor, float]:
    """X - O = (sum_t (C_t - O) S_t) S^-1 with the origin O = sum_t C_t, all of it in `system`.

    `row` is added to each row of the numerator. Returns the condition number, too.
    """
    import torch

    count, columns = len(tasks.experts), tasks.base.shape[1]
    origin = run(TaskSum(tasks.base, tasks.experts, [1.0] * count, tasks.means, system))
    ridges = [tasks.eps] * count
    equations = NormalEquations(tasks.base, tasks.experts, [1.0] * count, tasks.means, origin, system, ridges)
    S, numerator = run(equations)
    prior = (S.sum(dim=0) - tasks.ridge) / columns
    right = torch.cat([numerator if row is None else numerator + row, prior[None]])
    del numerator
    solved, condition = run(SpdSolve(S, right, ridge=tasks.ridge))
    return with_prior(origin.add_(solved[:-1]), solved[-1]), float(condition)


def with_prior(X: Tensor, row: Tensor) -> Tensor:
    """R (S + 1 c)^-1 in place from X = R S^-1 and the row c S^-1, by Sherman-Morrison."""
    along = times_vector(X, X.new_ones(X.shape[1]))
    return X.addr_(along, row, alpha=-1.0 / (1.0 + float(row.sum(dtype=row.dtype))))


def mean_row(
    run: Run, base: Tensor, experts: Sequence[Tensor], means: Tensor, weights: Sequence[float], dtype: str
) -> Tensor:
    """sum_t mu_t^T Sig_t, a row of d_in: what the column means add to sum_t tau_t Sig_t beyond C_t Sig_t."""
    import torch

    row = torch.zeros(base.shape[1], dtype=torch_dtype(dtype), device=base.device)
    for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        centred = run(TaskSum(base, [expert], [1.0], means[t : t + 1], dtype))
        row.add_((centred @ means[t].to(centred.dtype)) @ centred, alpha=weight)
    return row
