"""What the data-free solvers (WUDI, ACE) share: shared parameters, the rule for other tensors, small sums."""

from __future__ import annotations

import math
import re
import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymerge.methods.average import Copy, mean_of_tasks
from pymerge.methods.base import Action, Method, OpRunner, Parameter, Values
from pymerge.ops.base import compute_dtype, task_vector

Precision = Literal["auto", "float32", "float64"]

SHARED_PARAMETERS = (
    Parameter("scale", "number", 1.0, "factor of the merged delta: W_0 + scale * X"),
    Parameter(
        "rest",
        "choice",
        "mean",
        "tensors that are not solved: mean of the task vectors, or the base's",
        choices=("mean", "base"),
    ),
    Parameter("exclude", "texts", (), "regular expressions; linear weights whose name matches one are not solved"),
    Parameter(
        "precision",
        "choice",
        "auto",
        "of products and solves; auto: float64 where float32 would cost digits of the result",
        choices=("auto", "float32", "float64"),
    ),
)


class SolverMethod(Method):
    """A method that solves linear weights and leaves every other tensor to the `rest` rule."""

    @abstractmethod
    def solve(self, values: Values) -> Action:
        """The action for a linear weight."""

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        excluded = any(re.search(pattern, name) for pattern in values.merge["exclude"])
        if solvable and not excluded:
            return self.solve(values)
        return Copy() if values.merge["rest"] == "base" else mean_of_tasks(experts)


@dataclass(frozen=True)
class SolveInterference(Action):
    """W_0 + scale * (X_0 + D): X_0 = sum_t tau_t, and a displacement D that lowers WUDI's interference loss
    L(X) = sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t.

    Tasks that did not touch the tensor (n_t = 0) contribute nothing to L in the limit and are left out.
    """

    scale: float
    precision: Precision

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        norms = run_op("task_stats", base, experts).norms.tolist()
        if not all(map(math.isfinite, norms)):
            return not_a_number(base, out_dtype)
        if not any(norms):
            return base.to(out_dtype or base.dtype)
        weights = [1.0 / norm if norm > 0 else 0.0 for norm in norms]
        dtype = torch.float64 if self.precision == "float64" else compute_dtype(base, *experts)
        products = torch.float64 if self.precision == "auto" and self.is_delicate() else dtype
        X = weighted_task_vectors(base, experts, [1.0] * len(experts), products)
        A, B = run_op("normal_equations", base, experts, weights, origin=X, dtype=products)
        touched = [norm / base.numel() for norm in norms if norm > 0]
        X += self.displacement(run_op, A, B, dtype, math.sqrt(statistics.fmean(touched)))
        return add_to_base(base, X, self.scale, out_dtype)

    @abstractmethod
    def is_delicate(self) -> bool:
        """Whether normal equations in float32 would cost digits of the result."""

    @abstractmethod
    def displacement(self, run_op: OpRunner, A: Tensor, B: Tensor, dtype: torch.dtype, rms: float) -> Tensor:
        """D, d_out x d_in.

        Args:
            A, B: normal equations, B relative to X_0, in float64 where they are delicate.
            dtype: what the precision asks for.
            rms: root mean square of the deltas of the tasks that touched the tensor.
        """


def weighted_task_vectors(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype,
    means: Tensor | None = None,
) -> Tensor:
    """sum_t w_t tau~_t, d_out x d_in, in `dtype`; tau~_t = tau_t, less its mean row if `means` ([T, d_in]) are given.

    Without W_0, whose size would cost the small sum its digits.
    """
    total = torch.zeros_like(base, dtype=dtype)
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        total.add_(task_vector(base, expert, None if means is None else means[index], dtype), alpha=weight)
    return total


def not_a_number(base: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    """What solving gives where non-finite inputs are allowed: every element depends on every input."""
    return torch.full_like(base, math.nan, dtype=out_dtype or base.dtype)


def add_to_base(base: Tensor, X: Tensor, scale: float, out_dtype: torch.dtype | None) -> Tensor:
    """W_0 + scale * X, added in the wider of X's and the output's dtype, rounded once."""
    out_dtype = out_dtype or base.dtype
    wide = torch.promote_types(X.dtype, out_dtype)
    return base.to(wide).add(X.to(wide), alpha=scale).to(out_dtype)
