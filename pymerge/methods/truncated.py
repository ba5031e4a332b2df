"""Sums of what leading singular directions hold: STAR, of each task vector, and CART, of what is beside the mean."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import compute_dtype
from pymerge.ops.leading_part import LeadingPart
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SumTruncated(SolveDelta):
    """A sum over tasks of leading parts, in float64."""

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        share = [1.0 / len(experts)] * len(experts)
        mean = run(TaskSum(base, experts, share, dtype="F64"))
        total = mean * self.mean_weight
        for expert in experts:
            tau = run(TaskSum(base, [expert], [1.0], dtype="F64"))
            total.add_(self.part(run, tau, mean), alpha=self.weight(len(experts)))
        return total.to(compute_dtype(base, *experts))

    mean_weight: ClassVar[float]

    @abstractmethod
    def weight(self, experts: int) -> float:
        """Factor of each part."""

    @abstractmethod
    def part(self, run: Run, tau: Tensor, mean: Tensor) -> Tensor:
        """Part of a task vector that is kept, given the mean of all."""

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        return experts * (8 * small**2 * large + 9 * small**3)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        small, large = sorted(shape)
        # In float64: the mean, the sum, a task vector, its part, vectors of both sides, and LAPACK's work.
        return 8 * (8 * small * large + 8 * small**2)


@dataclass(frozen=True)
class AverageLeading(SumTruncated):
    """STAR."""

    total: float
    label: ClassVar[str] = "star"
    mean_weight: ClassVar[float] = 0.0

    def weight(self, experts: int) -> float:
        return 1.0 / experts

    def part(self, run: Run, tau: Tensor, mean: Tensor) -> Tensor:
        return run(LeadingPart(tau, total=self.total, restored=True))


@dataclass(frozen=True)
class AddLeading(SumTruncated):
    """CART."""

    share: float
    factor: float
    label: ClassVar[str] = "cart"
    mean_weight: ClassVar[float] = 1.0

    def weight(self, experts: int) -> float:
        return self.factor

    def part(self, run: Run, tau: Tensor, mean: Tensor) -> Tensor:
        return run(LeadingPart(tau - mean, math.ceil(self.share * min(tau.shape))))


class Star(SolverMethod):
    """STAR: the average of task vectors cut to their leading directions and brought to their nuclear norms again."""

    name = "star"
    summary = "average of task vectors on their leading singular directions, nuclear norms restored, data-free"
    source = "STAR, arXiv 2502.10339"
    parameters = (
        Parameter(
            "eta",
            "number",
            40.0,
            "per cent of the sum of a task vector's singular values that its leading ones must reach",
            above=0.0,
            maximum=100.0,
            varies=False,
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        return AverageLeading(values.merge["scale"], values.merge["eta"] / 100.0)


class Cart(SolverMethod):
    """CART: the mean, and what leading directions hold of each task vector beside it."""

    name = "cart"
    summary = "mean of the task vectors, and the leading directions of what each is beside it, data-free"
    source = "CART, arXiv 2412.12153"
    parameters = (
        Parameter(
            "share",
            "number",
            0.04,
            "share of the singular directions that is kept of each task vector's difference to the mean",
            minimum=0.0,
            maximum=1.0,
            varies=False,
        ),
        Parameter("lambda", "number", 0.1, "factor of the sum of what is kept", varies=False),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        return AddLeading(values.merge["scale"], values.merge["share"], values.merge["lambda"])


METHODS = (Star(), Cart())
