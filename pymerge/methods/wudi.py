"""WUDI-Merging (arXiv 2503.08099): minimise the interference between task vectors, layer by layer, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pymerge.methods.base import Action, Cost, OpRunner, Parameter, Values
from pymerge.methods.solver import (
    SHARED_PARAMETERS,
    Precision,
    SolverMethod,
    add_to_base,
    not_a_number,
    weighted_task_vectors,
)
from pymerge.ops.base import compute_dtype
from pymerge.ops.normal_equations import outputs_first

PUBLISHED_LR = 1e-5
# Root mean square of the deltas of the published setting (CLIP ViT-B/32, 8 tasks), to which lr 1e-5 belongs.
PUBLISHED_DELTA_RMS = 5e-4


@dataclass(frozen=True)
class SolveWudi(Action):
    """X_0 = sum_t tau_t, then Adam steps on L(X) = sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t; returns W_0 + scale * X.

    Tasks that did not touch the tensor (n_t = 0) contribute nothing to L in the limit and are left out.
    """

    iterations: int
    lr: float | Literal["auto"]
    scale: float
    precision: Precision = "auto"
    label: ClassVar[str] = "wudi"

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = torch.float64 if self.precision == "float64" else compute_dtype(base, *experts)
        norms = run_op("task_stats", base, experts).norms.tolist()
        if not all(map(math.isfinite, norms)):
            return not_a_number(base, out_dtype)
        if not any(norms):
            return base.to(out_dtype or base.dtype)
        weights = [1.0 / norm if norm > 0 else 0.0 for norm in norms]
        # Rounding in A and B is the same in all steps and adds up; that of a step does not. Float64 products here cost
        # a few percent of 300 steps and bring the error of X from about 1e-5 of the displacement to 1e-6.
        products = dtype if self.precision == "float32" else torch.float64
        X = weighted_task_vectors(base, experts, [1.0] * len(experts), products)
        A, B = run_op("normal_equations", base, experts, weights, origin=X, dtype=products)
        lr = self.learning_rate(norms, base.numel())
        X += run_op("wudi_adam", A.to(dtype), B.to(dtype), self.iterations, lr)
        return add_to_base(base, X, self.scale, out_dtype)

    def learning_rate(self, norms: Sequence[float], elements: int) -> float:
        """`lr`, or for "auto" the published one times this tensor's delta rms over the published setting's.

        Adam's step does not scale with the deltas while the solution does, so a fixed lr moves large deltas too
        little. The rule is pymerge's own.
        """
        if self.lr != "auto":
            return self.lr
        touched = [norm for norm in norms if norm > 0]
        rms = math.sqrt(sum(touched) / (len(touched) * elements))
        return PUBLISHED_LR * rms / PUBLISHED_DELTA_RMS

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        rows, columns = shape
        gram = 2 * rows * columns**2
        per_task = gram + (4 * rows**2 * columns if outputs_first(rows, columns) else gram)
        steps = self.iterations * 2 * rows * columns**2
        # A and one task's Gram in float64, A in float32; X and B in float64, two deltas while the products are formed;
        # B, D, m, v, the gradient and two temporaries in float32 while stepping.
        return Cost(experts * per_task + steps, 20 * columns**2 + 44 * rows * columns)


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
        return SolveWudi(merge["iterations"], merge["lr"], merge["scale"], merge["precision"])
