"""Weir, a method of our own: gradient flow on linear weights, its spectrum calibrated and kept below a crest;
convolutions solved by relative errors. docs/method-weir.md has its reasons and its evidence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Precision, SolverMethod
from pymerge.methods.wudi_flow import SolveFlow
from pymerge.ops.flow_to_length import SHORTEST, FlowToLength
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.temper_spectrum import TemperSpectrum

if TYPE_CHECKING:
    from torch import Tensor

# Time of the flow: wudi_flow's.
TIME = 300.0


def crest(tasks: int) -> float:
    """Largest singular value of X by the root mean square of all, ||X|| / sqrt(rank), for so many tasks.

    Few tasks leave little to cut: what is cut is theirs.
    """
    return max(1.75, 7.0 / tasks)


@dataclass(frozen=True)
class FlowBelowCrest(SolveDelta):
    """X of a linear weight."""

    precision: Precision
    label: ClassVar[str] = "weir"

    @property
    def flow(self) -> SolveFlow:
        """The flow before its spectrum is looked at."""
        return SolveFlow(1.0, self.precision, TIME)

    def of_inputs(self, dtypes: Collection[str]) -> FlowBelowCrest:
        return replace(self, precision="float64") if "F64" in dtypes else self

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        norms = run(TaskStats(base, experts)).norms.tolist()
        touched = [t for t, norm in enumerate(norms) if norm > 0]
        if not touched:
            return base.new_zeros(base.shape)
        experts, least = [experts[t] for t in touched], SHORTEST * sum(norms) / len(touched)
        norms = [max(norms[t], least) for t in touched]
        system = self.flow.equations(run, base, experts, norms)
        X = system.X.add_(self.flow.displacement(run, system))
        del system
        return run(TemperSpectrum(X, base, experts, crest(len(experts))))

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        spectrum = 4 * small**2 * large + 9 * small**3 + 2 * experts * small**2 * large
        return self.flow.flops(shape, experts) + spectrum

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        numel, small = math.prod(shape), min(shape, default=1)
        # In float64: X, what becomes of it, its vectors, a task vector, what it and all ask for, LAPACK's work.
        return max(self.flow.scratch(shape, experts, native), 8 * (8 * numel + 8 * small**2))


@dataclass(frozen=True)
class SolveKernel(SolveDelta):
    """X of a convolution's weight, d_out x d_in x window, as the matrix that has the window in its columns."""

    label: ClassVar[str] = "weir, kernel"

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        X = run(FlowToLength(base.flatten(1), [expert.flatten(1) for expert in experts]))
        return X.view(base.shape)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns, size = _flattened(shape, experts)
        return 9 * size**3 + 2 * rows * columns * (experts * (2 * rows + size) + 2 * size)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns, size = _flattened(shape, experts)
        # In float64: task vectors thrice, X, the mean; products, eigenvectors, LAPACK's work; what flows, six times.
        return 8 * ((3 * experts + 4) * rows * columns + 6 * size**2 + size * columns + 6 * rows * size + 2 * rows**2)


def _flattened(shape: tuple[int, ...], experts: int) -> tuple[int, int, int]:
    """Rows, columns, and the smaller number of columns and of all rows."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rows, columns, min(columns, experts * rows)


class Weir(SolverMethod):
    """Weir: no parameter to tune."""

    name = "weir"
    summary = (
        "gradient flow with a calibrated, capped spectrum, convolutions by relative errors; nothing to tune, data-free"
    )
    source = "pymerge, docs/method-weir.md"
    parameters = (*SHARED_PARAMETERS, PRECISION)

    def solve(self, values: Values) -> Action:
        return FlowBelowCrest(values.merge["scale"], values.merge["precision"])

    def kernel_action(self, name: str, values: Values) -> Action | None:
        return None if self.excluded(name, values) else SolveKernel(values.merge["scale"])


METHODS = (Weir(),)
