"""Closed forms of WUDI: gradient flow for a given time (wudi_flow), and the spectral filters SWUDI and SWUDI-A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pymerge.common.arrays import compute_code
from pymerge.methods.actions import Action, Kept, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.eigenvectors import Filtered, KeptFlow
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Equations, SolveInterference, SolverMethod
from pymerge.ops.gradient_flow import GradientFlow, flow_gain, schedule
from pymerge.ops.spectral_filter import Rank, SpectralFilter, filter_gain

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.factors import Factors, Product

# The error of a float32 result grows with the time: at most 7e-6 of X at 300 and 3e-5 at 1300 (benchmarks/results).
_FLOAT32_TIME = 500.0


class ClosedForm(SolveInterference, Filtered):
    """A displacement without steps."""

    @property
    def has_core(self) -> bool:
        return True

    def kept_of(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Kept:
        system = replace(self, precision="float64").equations(run, base, experts, norms)
        double = self.precision == "float64" or compute_code(base, *experts) == "F64"
        return KeptFlow(system.A, system.B, system.X, "F64" if double else "F32")

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        item = 8 if self.precision == "float64" else 4
        return 8 * columns + item * (columns**2 + 2 * rows * columns)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        # A, three polynomials of it and two sums, or eigenvectors; X, B, D, a delta and its difference.
        double = self.precision == "float64" or self.forms_in_double()
        return (8 if double else 4) * (6 * columns**2 + 6 * rows * columns)


@dataclass(frozen=True)
class SolveFlow(ClosedForm):
    """Gradient flow on the interference loss for a time, by products alone."""

    time: float
    label: ClassVar[str] = "wudi_flow"
    by_products: ClassVar[bool] = True

    def forms_in_double(self) -> bool:
        return self.time > _FLOAT32_TIME

    def displacement(self, run: Run, system: Equations) -> Tensor:
        return run(GradientFlow(system.A, system.B, self.time))

    def gain(self, values: Tensor) -> Tensor:
        return flow_gain(values, self.time)

    def run_core(self, tasks: Sequence[Factors]) -> Product:
        from pymerge.methods.core.flow import flow

        return flow(tasks, self.time).times(self.scale)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        # The largest eigenvalue of A is not known yet; its mean share of the trace T is a few for real deltas.
        return _equations(rows, columns, experts) + schedule(rows, columns, max(self.time, 1.0)).flops


@dataclass(frozen=True)
class SolveFilter(ClosedForm):
    """A spectral filter on the eigenvectors of A."""

    time: float
    rank: Rank
    label: ClassVar[str] = "swudi"

    def forms_in_double(self) -> bool:
        return True  # eigenvectors of float32 are good for 3e-5 at time 300, less for the exact minimiser

    def displacement(self, run: Run, system: Equations) -> Tensor:
        return run(SpectralFilter(system.A, system.B, self.time, self.rank))

    def gain(self, values: Tensor) -> Tensor:
        return filter_gain(values, self.time, self.rank)

    def kept_of(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Kept:
        if math.isinf(self.time):  # swudi_a, of which the scale alone varies
            return SolveInterference.kept_of(self, run, base, experts, norms)
        return super().kept_of(run, base, experts, norms)

    def run_core(self, tasks: Sequence[Factors]) -> Product:
        from pymerge.methods.core.flow import filtered

        return filtered(tasks, self.time, self.rank).times(self.scale)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        eigenvectors = 9 * columns**3 + 4 * rows * columns**2
        return _equations(rows, columns, experts) + eigenvectors


def _equations(rows: int, columns: int, experts: int) -> int:
    """Flops of A and B."""
    return experts * 4 * rows * columns**2


class WudiFlow(SolverMethod):
    """WUDI's loss followed by gradient flow for a fixed time: no step size, invariant to the scale of the deltas."""

    name = "wudi_flow"
    summary = "closed form of gradient flow on WUDI's loss, by products alone, data-free"
    source = "exponential filter of SWUDI, arXiv 2606.07289"
    parameters = (
        Parameter("time", "number", 300.0, "flow time t; 0 is the sum of task vectors", minimum=0.0),
        *SHARED_PARAMETERS,
        PRECISION,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return SolveFlow(merge["scale"], merge["precision"], merge["time"])


class Swudi(SolverMethod):
    """SWUDI: the exponential filter on the leading eigenvectors; with rank_ratio 1 the same merge as wudi_flow."""

    name = "swudi"
    summary = "exponential filter on the leading eigenvectors of WUDI's normal equations, data-free"
    source = "SWUDI, arXiv 2606.07289"
    parameters = (
        Parameter("time", "number", 300.0, "filter time t (published for CLIP: 1300)", minimum=0.0),
        Parameter(
            "rank_ratio", "number", 1.0, "share of eigenvectors (published for CLIP: 0.65)", above=0.0, maximum=1.0
        ),
        *SHARED_PARAMETERS,
        PRECISION,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return SolveFilter(merge["scale"], merge["precision"], merge["time"], merge["rank_ratio"])


class SwudiA(SolverMethod):
    """SWUDI-A: the exact minimiser on as many leading eigenvectors as the spectrum of each layer suggests."""

    name = "swudi_a"
    summary = "exact minimiser on an adaptive number of eigenvectors of WUDI's normal equations, data-free"
    source = "SWUDI-A, arXiv 2606.07289"
    parameters = (*SHARED_PARAMETERS, PRECISION)

    def solve(self, values: Values) -> Action:
        return SolveFilter(values.merge["scale"], values.merge["precision"], math.inf, "participation_sqrt")


METHODS = (WudiFlow(), Swudi(), SwudiA())
