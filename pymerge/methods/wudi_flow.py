"""Closed forms of WUDI: gradient flow for a given time (wudi_flow), and the spectral filters SWUDI and SWUDI-A."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.common.arrays import compute_code
from pymerge.methods.actions import Action, Kept, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.eigenvectors import Filtered, KeptFlow
from pymerge.methods.precision import FLOW_SCALE, FLOW_TIME, by_rows, largest_eigenvalue, small, tell
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Equations, SolveInterference, SolverMethod, mean_size
from pymerge.ops._leading import LEAST
from pymerge.ops.gradient_flow import GradientFlow, flow_gain, schedule
from pymerge.ops.spectral_filter import Rank, SpectralFilter, filter_gain
from pymerge.ops.stacked_gram import StackedGram
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Product, Spanned
    from pymerge.methods.core.factors import Factors


class ClosedForm(SolveInterference, Filtered):
    """A displacement without steps, from A and B, or where the tasks have fewer rows than columns, from their products.

    Of the stacked task vectors Z, A = Z^T Z, and B = C Z: a function of A times B is C f(K) Z, K = Z Z^T.
    """

    @property
    def has_core(self) -> bool:
        return True

    def kept_of(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Kept:
        system = self.equations_in("F64", "F64", run, base, experts, norms)
        double = self.precision == "float64" or compute_code(base, *experts) == "F64"
        return KeptFlow(system.A, system.B, system.X, "F64" if double else "F32")

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        item = 8 if self.precision == "float64" else 4
        return 8 * columns + item * (columns**2 + 2 * rows * columns)

    def equations(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Equations:
        touched = [t for t, norm in enumerate(norms) if norm > 0]
        experts, norms = [experts[t] for t in touched], [norms[t] for t in touched]
        dtype = compute_code(base, *experts)
        double = self.precision == "float64" or (
            self.precision == "auto" and dtype == "F32" and self.wants_double(run, base, experts, norms)
        )
        dtype = "F64" if double else dtype
        rows, columns = base.shape
        if not by_rows(rows, columns, len(experts)):
            return self.equations_in(dtype, dtype, run, base, experts, norms)
        X = run(TaskSum(base, experts, [1.0] * len(experts), dtype=dtype))
        Z, K = run(StackedGram(base, experts, [1.0 / norm for norm in norms], dtype=dtype))
        return Equations(X, K, of_rows(K, norms), mean_size(base, norms), Z)

    def displacement(self, run: Run, system: Equations) -> Tensor:
        D = self.moved(run, system.A, system.B, system.X.shape[1])
        return D if system.rows is None else D @ system.rows

    @abstractmethod
    def wants_double(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> bool:
        """Whether float32 would cost digits of the result."""

    @abstractmethod
    def moved(self, run: Run, A: Tensor, B: Tensor, columns: int) -> Tensor:
        """The displacement D of A and B; they may be of a weight of more columns, d_in."""

    @abstractmethod
    def item(self, rows: int, columns: int, experts: int) -> int:
        """Bytes of a number, at most."""

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        size = inner_size(rows, columns, experts)
        # A or K, three polynomials of it and three sums, or eigenvectors; Z, even where only some of the tasks touched
        # the weight; X, B, D, a delta and its difference.
        squares = 7 * size**2 + size * columns
        return self.item(rows, columns, experts) * (squares + 6 * rows * columns)

    def equations_flops(self, rows: int, columns: int, experts: int) -> int:
        """Flops of A and B, or of K and the product with Z."""
        size = inner_size(rows, columns, experts)
        return size**2 * columns + 2 * rows * size * columns if size < columns else experts * 4 * rows * columns**2


@dataclass(frozen=True)
class SolveFlow(ClosedForm):
    """Gradient flow on the interference loss for a time, by products alone."""

    time: float
    label: ClassVar[str] = "wudi_flow"
    by_products: ClassVar[bool] = True

    def wants_double(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> bool:
        rows, columns = base.shape
        double, reason = self.time > FLOW_TIME, f"time {self.time:g}"
        if small(rows, columns, len(experts)):
            double, reason = True, "small"
        elif not double and not by_rows(rows, columns, len(experts)):
            scale = self.time * len(experts)  # no eigenvalue exceeds the trace
            if scale > FLOW_SCALE:
                scale = self.time * largest_eigenvalue(run, base, experts, [1.0 / norm for norm in norms], norms)
            double, reason = scale > FLOW_SCALE, f"largest eigenvalue times time {scale:.3g}"
        tell(self.label, base.shape, "all" if double else "", reason)
        return double

    def moved(self, run: Run, A: Tensor, B: Tensor, columns: int) -> Tensor:
        return run(GradientFlow(A, B, self.time))

    def gain(self, values: Tensor) -> Tensor:
        return flow_gain(values, self.time)

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.flow import flow

        return flow(tasks, self.time).times(self.scale)

    def item(self, rows: int, columns: int, experts: int) -> int:
        if self.precision != "auto":
            return 8 if self.precision == "float64" else 4
        if small(rows, columns, 1) or self.time > FLOW_TIME:  # one task at least has touched it
            return 8
        return 4 if by_rows(rows, columns, experts) or experts * self.time <= FLOW_SCALE else 8

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        size = inner_size(rows, columns, experts)
        # The eigenvalues are not known yet. What the leading eigenvectors leave of large matrices is short; the largest
        # one of small matrices is a few hundredths of the trace T for real deltas.
        scale = min(self.time, 2.0) if size >= LEAST else self.time
        return self.equations_flops(rows, columns, experts) + schedule(rows, size, max(scale, 1.0)).flops


@dataclass(frozen=True)
class SolveFilter(ClosedForm):
    """A spectral filter on the eigenvectors of A."""

    time: float
    rank: Rank
    label: ClassVar[str] = "swudi"

    def wants_double(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> bool:
        return True  # eigenvectors of float32 are good for 3e-5 at time 300, less for the exact minimiser

    def moved(self, run: Run, A: Tensor, B: Tensor, columns: int) -> Tensor:
        return run(SpectralFilter(A, B, self.time, self.rank, columns))

    def gain(self, values: Tensor) -> Tensor:
        return filter_gain(values, self.time, self.rank, len(values))

    def kept_of(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Kept:
        if math.isinf(self.time):  # swudi_a, of which the scale alone varies
            return SolveInterference.kept_of(self, run, base, experts, norms)
        return super().kept_of(run, base, experts, norms)

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.flow import filtered

        return filtered(tasks, self.time, self.rank).times(self.scale)

    def item(self, rows: int, columns: int, experts: int) -> int:
        return 4 if self.precision == "float32" else 8

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        size = inner_size(rows, columns, experts)
        eigenvectors = 9 * size**3 + 4 * rows * size**2
        return self.equations_flops(rows, columns, experts) + eigenvectors


def inner_size(rows: int, columns: int, experts: int) -> int:
    """Rows of the matrix that is worked on: of K or of A."""
    return experts * rows if by_rows(rows, columns, experts) else columns


def of_rows(K: Tensor, norms: Sequence[float]) -> Tensor:
    """C of B = C Z, d_out x N, from K = Z Z^T of tasks of these squared norms n_t.

    Its block t is -sum_{s != t} tau_s tau_t^T / sqrt(n_t).
    """
    import torch

    rows = len(K) // len(norms)
    C = torch.zeros(rows, len(K), dtype=K.dtype, device=K.device)
    for t in range(len(norms)):
        for s, norm in enumerate(norms):
            if s != t:
                here, there = slice(t * rows, (t + 1) * rows), slice(s * rows, (s + 1) * rows)
                C[:, here].sub_(K[there, here], alpha=math.sqrt(norm))
    return C


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
