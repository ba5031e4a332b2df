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
from pymerge.ops.base import compute_dtype

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
        automatic = self.precision == "auto"
        products = torch.float64 if automatic and self.forms_in_double() else dtype
        steps = torch.float64 if automatic and self.solves_in_double() else dtype
        X: Tensor = run_op("task_sum", base, experts, [1.0] * len(experts), dtype=products)
        A, B = run_op("normal_equations", base, experts, weights, origin=X, dtype=products)
        A, B = A.to(steps), B.to(steps)
        touched = [norm / base.numel() for norm in norms if norm > 0]
        X += self.displacement(run_op, A, B, math.sqrt(statistics.fmean(touched)))
        return add_to_base(base, X, self.scale, out_dtype)

    @abstractmethod
    def forms_in_double(self) -> bool:
        """Whether forming the normal equations in float32 would cost digits of the result."""

    def solves_in_double(self) -> bool:
        """Whether going on in float32 from there would."""
        return self.forms_in_double()

    @abstractmethod
    def displacement(self, run_op: OpRunner, A: Tensor, B: Tensor, rms: float) -> Tensor:
        """D, d_out x d_in.

        Args:
            A, B: normal equations, B relative to X_0.
            rms: root mean square of the deltas of the tasks that touched the tensor.
        """


def not_a_number(base: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    """What solving gives where non-finite inputs are allowed: every element depends on every input."""
    return torch.full_like(base, math.nan, dtype=out_dtype or base.dtype)


def add_to_base(base: Tensor, X: Tensor, scale: float, out_dtype: torch.dtype | None) -> Tensor:
    """W_0 + scale * X, added in the wider of X's and the output's dtype, rounded once."""
    out_dtype = out_dtype or base.dtype
    wide = torch.promote_types(X.dtype, out_dtype)
    return base.to(wide).add(X.to(wide), alpha=scale).to(out_dtype)
