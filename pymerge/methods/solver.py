"""Parts that the data-free solvers share: parameters, the rule for other tensors, small sums."""

from __future__ import annotations

import math
import re
import statistics
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from pymerge.common.dtypes import torch_dtype
from pymerge.methods.actions import Action, Kept, Run, Solve, copy, mean_of_tasks
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.kept import KeptDelta, add_to_base, delta_bytes
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

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
    Parameter(
        "exclude",
        "texts",
        (),
        "regular expressions; linear weights whose name matches one are not solved",
        varies=False,
    ),
)
PRECISION = Parameter(
    "precision",
    "choice",
    "auto",
    "of products and solves; auto: float64 where float32 would change digits of what is written",
    choices=("auto", "float32", "float64"),
    varies=False,
)

# Squares of the elements of deltas that are longer, or shorter by as much, are beyond what float32 holds.
_LARGEST_NORM = 1e28


class SolverMethod(Method):
    """A method that solves linear weights and leaves every other tensor to the `rest` rule."""

    @abstractmethod
    def solve(self, values: Values) -> Action:
        """The action for a linear weight."""

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if solvable and not self.excluded(name, values):
            return self.solve(values)
        return copy() if values.merge["rest"] == "base" else mean_of_tasks(experts)

    @staticmethod
    def excluded(name: str, values: Values) -> bool:
        """Whether the tensor is not to be solved."""
        return any(re.search(pattern, name) for pattern in values.merge["exclude"])


class Equations(NamedTuple):
    """Equations of WUDI's interference loss for one layer."""

    X: Tensor  # X_0, d_out x d_in
    A: Tensor  # normal equations, B relative to X_0
    B: Tensor
    rms: float  # root mean square of the deltas of the tasks that touched the tensor
    # Z, N x d_in, where A and B are N x N and d_out x N: D is a displacement of these, times Z. None: it is one of X.
    rows: Tensor | None = None


@dataclass(frozen=True)
class SolveInterference(Solve):
    """W_0 + scale * (X_0 + D): X_0 = sum_t tau_t, and a displacement D that lowers WUDI's interference loss
    L(X) = sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t.

    Tasks that did not touch the tensor (n_t = 0) contribute nothing to L in the limit and are left out.
    """

    scale: float
    precision: Precision

    def of_inputs(self, dtypes: Collection[str]) -> SolveInterference:
        return replace(self, precision="float64") if "F64" in dtypes else self

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        return self.merge_layers(run, [base], [experts], out_dtype)[0]

    def merge_layers(
        self, run: Run, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], out_dtype: str
    ) -> list[Tensor]:
        """The merged matrices of L layers of one shape, their displacements found together."""
        merged: dict[int, Tensor] = {}
        systems: dict[int, Equations] = {}
        for layer, (base, tasks) in enumerate(zip(bases, experts, strict=True)):
            norms = run(TaskStats(base, tasks)).norms.tolist()
            if not all(map(math.isfinite, norms)):
                merged[layer] = not_a_number(base, out_dtype)
            elif not any(norms):
                merged[layer] = base.to(torch_dtype(out_dtype))
            else:
                systems[layer] = self.equations(run, base, tasks, norms)
        displacements = self.displacements(run, list(systems.values()))
        for (layer, system), D in zip(systems.items(), displacements, strict=True):
            merged[layer] = add_to_base(bases[layer], system.X.add_(D), self.scale, out_dtype)
        return [merged[layer] for layer in range(len(bases))]

    def keep(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Kept | None:
        norms = run(TaskStats(base, experts)).norms.tolist()
        if not (all(map(math.isfinite, norms)) and any(norms)):
            return None
        return self.kept_of(run, base, experts, norms)

    def kept_of(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Kept:
        """Keep of a layer whose tasks have the squared norms n_t, finite and not all 0."""
        system = self.equations(run, base, experts, norms)
        (D,) = self.displacements(run, [system])
        return KeptDelta(system.X.add_(D))

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return delta_bytes(shape)

    @abstractmethod
    def equations(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Equations:
        """The equations of a layer whose tasks have the squared norms n_t, finite and not all 0."""

    def equations_in(
        self, products: str, steps: str, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]
    ) -> Equations:
        """The equations formed in one dtype, F32 or F64, for steps in another."""
        weights = [1.0 / norm if norm > 0 else 0.0 for norm in norms]
        if not all(1.0 / _LARGEST_NORM < norm < _LARGEST_NORM for norm in norms if norm > 0):
            products = "F64"
        X = run(TaskSum(base, experts, [1.0] * len(experts), dtype=products))
        A, B = run(NormalEquations(base, experts, weights, origin=X, dtype=products))
        return Equations(X, A.to(torch_dtype(steps)), B.to(torch_dtype(steps)), mean_size(base, norms))

    def displacements(self, run: Run, systems: Sequence[Equations]) -> Sequence[Tensor]:
        """D of each layer."""
        return [self.displacement(run, system) for system in systems]

    @abstractmethod
    def displacement(self, run: Run, system: Equations) -> Tensor:
        """D of one layer, d_out x d_in."""


def mean_size(base: Tensor, norms: Sequence[float]) -> float:
    """Root mean square of the deltas of the tasks that touched a tensor, from their squared norms."""
    return math.sqrt(statistics.fmean([norm / base.numel() for norm in norms if norm > 0]))


def not_a_number(base: Tensor, out_dtype: str) -> Tensor:
    """NaN of the base's shape: where non-finite inputs are allowed, every element depends on every input."""
    import torch

    return torch.full_like(base, math.nan, dtype=torch_dtype(out_dtype))
