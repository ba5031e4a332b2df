"""pymerge's side of the comparisons: whole actions of its methods on one weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import published
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import code_of
from pymerge.methods.ace import SolveAce
from pymerge.methods.actions import Solve
from pymerge.methods.solver import Precision
from pymerge.methods.wudi import SolveWudi
from pymerge.methods.wudi_flow import SolveFilter, SolveFlow

METHODS = ("wudi", "wudi_flow", "swudi", "ace", "ace_refined")
LR, TIME = 1e-5, 300.0

Form = Callable[[Tensor, list[Tensor]], Tensor]  # weights -> merged weight


def action(method: str, precision: Precision, eps: float, iterations: int = published.STEPS) -> Solve:
    """What pymerge does with one weight."""
    actions: dict[str, Solve] = {
        "wudi": SolveWudi(1.0, precision, iterations, LR),
        "wudi_flow": SolveFlow(1.0, precision, TIME),
        "swudi": SolveFilter(1.0, precision, TIME, 1.0),
        "ace": SolveAce(eps, math.inf, 0.3, "released", 1.0, precision),
        "ace_refined": SolveAce(eps, -1.0, 0.3, "released", 1.0, precision),
    }
    return actions[method]


def ours(
    method: str, precision: Precision, eps: float, iterations: int = published.STEPS, out: torch.dtype | None = None
) -> Form:
    """That on whole weights, on the backend that it chooses itself; into `out`, or the base's dtype."""
    solve, run = action(method, precision, eps, iterations), Runner("auto", "cpu")
    return lambda base, experts: solve.run(run, base, experts, code_of(out or base.dtype))
