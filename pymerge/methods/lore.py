"""LoRE-Merging: a common weight and low-rank differences to it, estimated in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import compute_dtype
from pymerge.ops.shrink import RULES, Rule, Shrink
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EstimateLowRank(SolveDelta):
    """X = x + lambda mean_t D_t of coordinate descent on x and all D_t, tau_t close to x + D_t, D_t of low rank."""

    update: Rule
    mu: float
    iterations: int
    factor: float
    label: ClassVar[str] = "lore"

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        share = 1.0 / len(experts)
        average = run(TaskSum(base, experts, [share] * len(experts), dtype="F64"))
        taus = [run(TaskSum(base, [expert], [1.0], dtype="F64")) for expert in experts]
        common, mean = average, average.new_zeros(average.shape)  # mean of the D_t, which start at 0
        for _ in range(self.iterations):
            common = average - mean
            mean = average.new_zeros(average.shape)
            for tau in taus:
                mean.add_(run(Shrink(tau - common, self.mu, self.update)), alpha=share)
        return (common + self.factor * mean).to(compute_dtype(base, *experts))

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        return self.iterations * experts * (8 * small**2 * large + 9 * small**3)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        small, large = sorted(shape)
        # In float64: all task vectors, average, common weight, mean, a difference, what is left of it, and vectors.
        return 8 * ((experts + 8) * small * large + 8 * small**2)


class Lore(SolverMethod):
    """LoRE-Merging: low-rank estimation of what each task adds to a common weight."""

    name = "lore"
    summary = "a common weight and low-rank differences to it by coordinate descent, data-free"
    source = "LoRE-Merging, arXiv 2502.10749"
    parameters = (
        Parameter(
            "update",
            "choice",
            "svt",
            "of a difference: singular values thresholded, as published, or the exact step for the penalty as printed "
            "(exact_sq: squared nuclear norm) or without the square (exact_nuc)",
            choices=RULES,
            varies=False,
        ),
        Parameter("mu", "number", 0.01, "threshold or penalty; large: the average", minimum=0.0, varies=False),
        Parameter("iterations", "integer", 20, "rounds of coordinate descent", minimum=0, varies=False),
        Parameter("lambda", "number", 1.0, "factor of the mean difference; 1 tends to the average", varies=False),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return EstimateLowRank(merge["scale"], merge["update"], merge["mu"], merge["iterations"], merge["lambda"])


METHODS = (Lore(),)
