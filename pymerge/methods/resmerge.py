"""ResMerge, for experts that were trained by reinforcement learning: residuals averaged, leading directions damped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops.resmerge import Resmerge

if TYPE_CHECKING:
    from torch import Tensor

# Products that power iteration takes, for estimates of its cost.
_STEPS = 40


@dataclass(frozen=True)
class MergeResiduals(SolveDelta):
    """X of the op."""

    largest: float
    least: float
    head: float
    label: ClassVar[str] = "resmerge"

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return run(Resmerge(base, experts, self.largest, self.least, self.head))

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return experts * shape[0] * shape[1] * (32 * _STEPS + 12)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return 8 * (experts + 4) * shape[0] * shape[1]


class ResMerge(SolverMethod):
    """ResMerge."""

    name = "resmerge"
    summary = "task vectors without their leading singular directions, averaged and longer where they agree; data-free"
    source = "ResMerge, arXiv 2606.02252"
    parameters = (
        Parameter(
            "exponent_max", "number", 1.0, "exponent of the agreement where there is none", minimum=0.0, varies=False
        ),
        Parameter(
            "exponent_min", "number", 0.7, "exponent of the agreement where it is whole", minimum=0.0, varies=False
        ),
        Parameter(
            "head",
            "number",
            0.2,
            "length of the leading directions' mean, of that of the residuals",
            minimum=0.0,
            varies=False,
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        if merge["exponent_min"] > merge["exponent_max"]:
            raise ArgumentError(
                f"exponent_min {merge['exponent_min']:g} is above exponent_max {merge['exponent_max']:g}; exchange them"
            )
        return MergeResiduals(merge["scale"], merge["exponent_max"], merge["exponent_min"], merge["head"])


METHODS = (ResMerge(),)
