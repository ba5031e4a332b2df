"""ACE-Merging (arXiv 2603.02945): estimate each task's input covariance from its delta, merge in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pymerge.common.arrays import as_tensor, compute_code, dtype_of
from pymerge.common.dtypes import torch_dtype
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Kept, Run, mean_of_tasks
from pymerge.methods.base import Parameter, Values
from pymerge.methods.eigenvectors import KeptAce, Ridged
from pymerge.methods.kept import add_to_base
from pymerge.methods.rows import Rows
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Precision, SolverMethod, not_a_number
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.spectral_refine import SpectralRefine
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_stats import Stats, TaskStats
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.factors import Factors, Product

# Keeps logarithms and divisions of the released code finite. It belongs to the released numbers.
_TINY = 1e-12
# A centred trace this far below the uncentred one is rounding: all rows of the delta are equal.
_NO_COVARIANCE = 1e-24
# The error of a float32 solve is about 1e-7 times the condition number of S: up to this one, below 1e-5 of X.
_FLOAT32_CONDITION = 50.0

Variant = Literal["released", "paper"]


def heterogeneity(norms: Sequence[float], variant: Variant) -> float:
    """gamma = Var_t[log n_t] / Mean_t[log n_t]^2 of the squared norms n_t; NaN for one task.

    "released": unbiased variance, and 1e-12 inside the logarithm and in the denominator. "paper": population
    variance. gamma is not invariant to the scale of the deltas: it has a pole where the mean of log n_t is 0.
    """
    if len(norms) < 2:
        return math.nan
    if variant == "released":
        logs = [math.log(norm + _TINY) for norm in norms]
        return statistics.variance(logs) / (statistics.fmean(logs) ** 2 + _TINY)
    logs = [math.log(norm) for norm in norms]
    mean = statistics.fmean(logs)
    return statistics.pvariance(logs) / mean**2 if mean != 0.0 else math.inf


@dataclass(frozen=True)
class SolveAce(Ridged):
    """Closed-form merge with covariances Sig_t of the centred deltas C_t = tau_t - 1 mu_t^T; returns W_0 + scale * X.

    X = (sum_t C_t (Sig_t + e_t I)) (sum_t (Sig_t + e_t I) + 1 c)^-1. With heterogeneous tasks (gamma above the
    threshold) the Sig_t have trace 1, and the leading singular directions get an isotropic term. The released code
    and the paper differ in four places, marked below. Tasks with a zero delta are left out.
    """

    eps: float
    gamma_threshold: float
    k_frac: float
    variant: Variant
    scale: float
    precision: Precision
    label: ClassVar[str] = "ace"

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        stats = run(TaskStats(base, experts))
        norms, traces = stats.norms.tolist(), stats.traces.tolist()
        if not all(map(math.isfinite, norms)):
            return not_a_number(base, out_dtype)
        heterogeneous = self.is_heterogeneous([norm for norm in norms if norm > 0])
        # Dividing by the trace needs one: a one-row weight, whose centred delta is 0, has no covariance to scale.
        kept = [
            t for t, norm in enumerate(norms) if norm > 0 and not (heterogeneous and traces[t] <= _NO_COVARIANCE * norm)
        ]
        if not kept:
            return as_tensor(run(mean_of_tasks(len(experts)).op(Rows(base, experts, out_dtype))))
        experts = [experts[t] for t in kept]
        stats = Stats(stats.norms[kept], stats.traces[kept], stats.means[kept])

        double = self.precision == "float64" or dtype_of(base) == "F64"
        # The refinement amplifies errors by the inverse of the gap between two singular values.
        if self.precision == "auto" and not double:
            double = heterogeneous or self.needs_double(run, base, experts, stats)
        X, condition = self.merged_delta(run, base, experts, stats, heterogeneous, double)
        if self.precision == "auto" and not double and condition > _FLOAT32_CONDITION:
            X, _ = self.merged_delta(run, base, experts, stats, heterogeneous, True)
        return add_to_base(base, X, self.scale, out_dtype)

    @property
    def has_core(self) -> bool:
        return True

    def run_core(self, tasks: Sequence[Factors]) -> Product:
        from pymerge.methods.core.ace import Formula, centred, merged
        from pymerge.methods.core.factors import nothing, plain_sum

        found = centred(tasks)
        norms, traces = found.space.norms, found.traces
        if not norms:
            return nothing(found.space.shape)
        heterogeneous, released = self.is_heterogeneous(norms), self.variant == "released"
        kept = [t for t, n in enumerate(norms) if not (heterogeneous and traces[t] <= _NO_COVARIANCE * n)]
        if not kept:
            return plain_sum(tasks, 1.0 / len(tasks))
        found = found.only(kept)
        tiny = _TINY if released else 0.0
        weights = [1.0 / (trace + tiny) if heterogeneous else 1.0 for trace in found.traces]
        mean = statistics.fmean(found.space.norms) + _TINY
        formula = Formula(
            weights,
            [self.eps * weight for weight in weights],
            mean if heterogeneous and released else 1.0,
            not released,
            self.refined(found.space.shape) if heterogeneous else 0,
        )
        return merged(found, formula).times(self.scale)

    def refined(self, shape: Sequence[int]) -> int:
        """k of the refinement."""
        return max(1, int(min(shape) * self.k_frac))

    def needs_double(self, run: Run, base: Tensor, experts: Sequence[Tensor], stats: Stats) -> bool:
        """Whether the system (of tasks that are not heterogeneous) is likely too ill conditioned for float32.

        No eigenvalue of a covariance exceeds its trace, which settles it for large ridges. Else one task's system
        stands for the sum of all: it costs a small part of what solving twice would.
        """
        traces = stats.traces.tolist()
        ridge = self.eps * len(traces)
        if sum(traces) + ridge <= _FLOAT32_CONDITION * ridge:
            return False
        largest = max(range(len(traces)), key=traces.__getitem__)
        system = run(TaskGram(base, [experts[largest]], [1.0], stats.means[largest : largest + 1]))
        system.diagonal().add_(self.eps)
        try:
            condition = run(SpdSolve(system, system.new_empty(0, len(system)))).condition
        except ArgumentError:  # not positive definite after rounding
            return True
        return bool(condition > _FLOAT32_CONDITION)

    def is_heterogeneous(self, norms: Sequence[float]) -> bool:
        """Whether gamma exceeds the threshold. A threshold below 0 forces yes, infinity no; one task alone says no."""
        if self.gamma_threshold < 0:
            return True
        return bool(heterogeneity(norms, self.variant) > self.gamma_threshold)

    def merged_delta(
        self,
        run: Run,
        base: Tensor,
        experts: Sequence[Tensor],
        stats: Stats,
        heterogeneous: bool,
        double: bool,
    ) -> tuple[Tensor, float]:
        """Return X (d_out x d_in, float64 if `double` else float32) and the condition number of the system."""
        dtype = "F64" if double else "F32"
        released = self.variant == "released"
        tiny = _TINY if released else 0.0
        weights = [1.0 / (p + tiny) if heterogeneous else 1.0 for p in stats.traces.tolist()]
        ridges = [self.eps * weight for weight in weights]

        ones = [1.0] * len(experts)
        system, numerator = run(NormalEquations(base, experts, weights, stats.means, None, dtype, ridges))
        prior = (system.sum(dim=0) - sum(ridges)) / system.shape[0]
        if heterogeneous and released:  # not in the paper
            prior = prior / (float(stats.norms.mean()) + _TINY)
        row = None if released and not heterogeneous else self.mean_row(run, base, experts, stats, weights, dtype)
        right = numerator
        if not released and row is not None:  # the released numerator has the centred deltas; the paper's, the deltas
            right = numerator + (row + row.new_tensor(ridges) @ stats.means.to(row.dtype))
        X, condition = run(SpdSolve(system, right, prior))
        if row is None or not heterogeneous:
            return X, float(condition)

        average = system / len(experts)
        if not released:  # the paper's has no ridge in it
            average.diagonal().sub_(sum(ridges) / len(experts))
        residual = numerator + row
        residual -= run(TaskSum(base, experts, ridges, stats.means, dtype))
        residual.addmm_(run(TaskSum(base, experts, ones, dtype=dtype)), average, alpha=-1.0)
        return run(SpectralRefine(X, residual, self.refined(base.shape))), float(condition)

    def keep(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Kept | None:
        """Eigenvectors, of tasks that are not heterogeneous: others are refined by a decomposition for every eps."""
        stats = run(TaskStats(base, experts))
        norms = stats.norms.tolist()
        if not all(map(math.isfinite, norms)) or not any(norms):
            return None
        kept = [t for t, norm in enumerate(norms) if norm > 0]
        if self.is_heterogeneous([norms[t] for t in kept]):
            return None
        experts, means = [experts[t] for t in kept], stats.means[kept]
        ones = [1.0] * len(experts)
        S, N = run(NormalEquations(base, experts, ones, means, None, "F64"))
        C = run(TaskSum(base, experts, ones, means, "F64"))
        if self.variant == "paper":  # the deltas, not centred
            N = N + self.mean_row(run, base, experts, Stats(stats.norms[kept], stats.traces[kept], means), ones, "F64")
            C = C + means.sum(dim=0).to(C.dtype)
        double = self.precision == "float64" or compute_code(base, *experts) == "F64"
        return KeptAce(S, N, C, len(experts), "F64" if double else "F32")

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        item = 8 if self.precision == "float64" else 4
        return 3 * 8 * columns + item * (columns**2 + 2 * rows * columns)

    @staticmethod
    def mean_row(
        run: Run,
        base: Tensor,
        experts: Sequence[Tensor],
        stats: Stats,
        weights: Sequence[float],
        dtype: str,
    ) -> Tensor:
        """sum_t mu_t^T Sig_t, a row of d_in: what the column means add to sum_t tau_t Sig_t beyond C_t Sig_t."""
        import torch

        row = torch.zeros(base.shape[1], dtype=torch_dtype(dtype), device=base.device)
        for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            centred = run(TaskSum(base, [expert], [1.0], stats.means[t : t + 1], dtype))
            row.add_((centred @ stats.means[t].to(centred.dtype)) @ centred, alpha=weight)
        return row

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        product = 2 * rows * columns**2
        return experts * 2 * product + columns**3 // 3 + 2 * product

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        # Covariance, system, factor, one task's Gram, and for the refinement eigenvectors and LAPACK's work; numerator,
        # solution, total, residual and four temporaries, in float64 at worst.
        return 8 * (6 * columns**2 + 8 * rows * columns)


class Ace(SolverMethod):
    """ACE-Merging, as released or as in the paper."""

    name = "ace"
    summary = "adaptive covariance estimation in closed form on each linear weight, data-free"
    source = "ACE-Merging, arXiv 2603.02945"
    parameters = (
        Parameter(
            "eps",
            "number",
            1e-5,
            "ridge of each covariance (paper: 1e-5; GPT-2 4e-2, RoBERTa 2e-4)",
            above=0.0,
        ),
        Parameter(
            "gamma_threshold",
            "number",
            0.3,
            "heterogeneity above it: below 0 always, .inf never",
            infinite=True,
            varies=False,
        ),
        Parameter(
            "k_frac",
            "number",
            0.3,
            "share of singular directions that are refined",
            minimum=0.0,
            maximum=1.0,
            varies=False,
        ),
        Parameter("variant", "choice", "released", "which formulas", choices=("released", "paper"), varies=False),
        *SHARED_PARAMETERS,
        PRECISION,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return SolveAce(
            merge["eps"],
            merge["gamma_threshold"],
            merge["k_frac"],
            merge["variant"],
            merge["scale"],
            merge["precision"],
        )


METHODS = (Ace(),)
