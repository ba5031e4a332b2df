"""WUDI-Merging (arXiv 2503.08099): minimise the interference between task vectors, layer by layer, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pymerge.methods.base import Action, Cost, OpRunner, Parameter, Values
from pymerge.methods.solver import SHARED_PARAMETERS, SolveInterference, SolverMethod
from pymerge.ops.normal_equations import outputs_first

PUBLISHED_LR = 1e-5
# Root mean square of the deltas of the published setting (CLIP ViT-B/32, 8 tasks), to which lr 1e-5 belongs.
PUBLISHED_DELTA_RMS = 5e-4


@dataclass(frozen=True)
class SolveWudi(SolveInterference):
    """Adam steps from X_0."""

    iterations: int
    lr: float | Literal["auto"]
    label: ClassVar[str] = "wudi"

    def is_delicate(self) -> bool:
        # Rounding in A and B is the same in all steps and adds up; that of a step does not. Float64 products cost a few
        # percent of 300 steps and bring the error of X from about 1e-5 of the displacement to 1e-6.
        return True

    def displacement(self, run_op: OpRunner, A: Tensor, B: Tensor, dtype: torch.dtype, rms: float) -> Tensor:
        moved: Tensor = run_op("wudi_adam", A.to(dtype), B.to(dtype), self.iterations, self.learning_rate(rms))
        return moved

    def learning_rate(self, rms: float) -> float:
        """`lr`, or for "auto" the published one times the deltas' `rms` over the published setting's.

        Adam's step does not scale with the deltas while the solution does, so a fixed lr moves large deltas too
        little. The rule is pymerge's own.
        """
        return PUBLISHED_LR * rms / PUBLISHED_DELTA_RMS if self.lr == "auto" else self.lr

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        rows, columns = shape
        gram = 2 * rows * columns**2
        per_task = gram + (4 * rows**2 * columns if outputs_first(rows, columns) else gram)
        steps = self.iterations * 2 * rows * columns**2
        # A and one task's Gram in float64, A in float32; X and B in float64, two deltas while the products are formed;
        # B, D, m, v, the gradient and two temporaries in float32 while stepping.
        return Cost(experts * per_task + steps, 20 * columns**2 + 48 * rows * columns)


class Wudi(SolverMethod):
    """WUDI-Merging as published: start at the sum of task vectors, 300 Adam steps at lr 1e-5."""

    name = "wudi"
    summary = "minimise interference by Adam on each linear weight, data-free"
    source = "WUDI-Merging, arXiv 2503.08099"
    parameters = (
        Parameter("iterations", "integer", 300, "Adam steps", minimum=0),
        Parameter(
            "lr",
            "number_or_auto",
            PUBLISHED_LR,
            "Adam step size; auto: scaled to the size of the deltas",
            above=0.0,
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return SolveWudi(merge["scale"], merge["precision"], merge["iterations"], merge["lr"])
