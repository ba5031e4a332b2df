"""ACE-Merging (arXiv 2603.02945): estimate each task's input covariance from its delta, merge in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.common.arrays import as_tensor, compute_code
from pymerge.methods import ace_forms as forms
from pymerge.methods import ace_refined
from pymerge.methods.actions import Action, Kept, Run, mean_of_tasks
from pymerge.methods.base import Parameter, Values
from pymerge.methods.eigenvectors import KeptAce, Ridged
from pymerge.methods.heterogeneity import AT_THE_POLE, TINY, Gamma, Variant, heterogeneity, near_the_pole
from pymerge.methods.kept import add_to_base
from pymerge.methods.precision import ACE_CONDITIONS, ACE_CONDITIONS_OF_ROWS, by_rows, largest_eigenvalue, small, tell
from pymerge.methods.rows import Rows
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Precision, SolverMethod, not_a_number
from pymerge.methods.split_deltas import Scaled
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_stats import Stats, TaskStats
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Product, Spanned
    from pymerge.methods.core.factors import Factors

# A centred trace this far below the uncentred one is rounding: all rows of the delta are equal.
_NO_COVARIANCE = 1e-24
# Times the limit for float32: a system that was estimated to be within it is solved again only beyond that.
_SLACK = 1.5


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
    gamma: Gamma = "released"
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

        wide = self.precision == "float64" or compute_code(base, *experts) == "F64"
        if heterogeneous:
            X = self.refined_delta(run, base, experts, stats, wide)
        else:
            X = self.plain_delta(run, base, experts, stats, wide)
        return add_to_base(base, X, self.scale, out_dtype)

    def plain_delta(self, run: Run, base: Tensor, experts: Sequence[Tensor], stats: Stats, wide: bool) -> Tensor:
        """X of tasks that are not heterogeneous: in float64 if `wide`, else what loses nothing by it in float32."""
        tasks = forms.Tasks(base, experts, stats.means, self.eps)
        rows, columns = base.shape
        limits = ACE_CONDITIONS
        if self.variant == "released" and by_rows(rows, columns, len(experts)):
            limits = ACE_CONDITIONS_OF_ROWS
        if wide or self.precision == "float32":
            return self.solved(run, tasks, stats, len(limits) if wide else 0)[0]
        condition = self.condition(run, tasks, stats, limits[0])
        level = sum(condition > limit for limit in limits)
        X, found = self.solved(run, tasks, stats, level)
        if level < len(limits) and found > _SLACK * limits[level]:
            level, condition = len(limits), found
            X, _ = self.solved(run, tasks, stats, level)
        reason = f"condition {condition:.3g}" if math.isfinite(condition) else "condition not estimated"
        tell("ace", base.shape, ("", "solves", "Gram matrices and solves", "all")[level], reason)
        return X

    def solved(self, run: Run, tasks: forms.Tasks, stats: Stats, level: int) -> tuple[Tensor, float]:
        """X and the condition number of the system. In float64: solves from level 1, Grams from 2, products from 3."""
        base, experts, row = tasks.base, tasks.experts, None
        system, grams, products = ("F64" if level >= least else "F32" for least in (1, 2, 3))
        if self.variant == "paper":  # its numerator has the deltas; the released one, the centred deltas
            row = forms.mean_row(run, base, experts, stats.means, [1.0] * len(experts), system)
            row = row + self.eps * stats.means.sum(dim=0).to(row.dtype)
        rows, columns = base.shape
        form = forms.cheapest(rows, columns, len(experts), level > 0, plain=row is None)
        if form == "rows":
            return forms.by_products_of_rows(run, tasks, grams, system, products)
        weights = form == "weights"
        return (
            forms.by_weights(run, tasks, system, products, row)
            if weights
            else forms.by_numerator(run, tasks, system, row)
        )

    @property
    def has_core(self) -> bool:
        return True

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.ace import Formula, centred, merged
        from pymerge.methods.core.deltas import nothing
        from pymerge.methods.core.factors import plain_sum

        found = centred(tasks)
        norms, traces = found.space.norms, found.traces
        if not norms:
            return nothing(found.space.shape)
        heterogeneous, released = self.is_heterogeneous(norms), self.variant == "released"
        kept = [t for t, n in enumerate(norms) if not (heterogeneous and traces[t] <= _NO_COVARIANCE * n)]
        if not kept:
            return plain_sum(tasks, 1.0 / len(tasks))
        found = found.only(kept)
        tiny = TINY if released else 0.0
        weights = [1.0 / (trace + tiny) if heterogeneous else 1.0 for trace in found.traces]
        mean = statistics.fmean(found.space.norms) + TINY
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

    def condition(self, run: Run, tasks: forms.Tasks, stats: Stats, enough: float) -> float:
        """Estimate the condition number of the system, or bound it by `enough`; infinity for small weights.

        No eigenvalue of a covariance exceeds its trace, which settles it for large ridges. Else some rows tell.
        """
        rows, columns = tasks.base.shape
        traces = stats.traces.tolist()
        if any(traces) and small(rows, columns, len(traces)):
            return math.inf
        bound: float = 1.0 + sum(traces) / tasks.ridge
        if bound <= enough:
            return bound
        ones = [1.0] * len(traces)
        return largest_eigenvalue(run, tasks.base, tasks.experts, ones, traces, stats.means) / tasks.ridge

    def is_heterogeneous(self, norms: Sequence[float]) -> bool:
        """Whether gamma exceeds the threshold. A threshold below 0 forces yes, infinity no; one task alone says no."""
        if self.gamma_threshold < 0:
            return True
        return bool(heterogeneity(norms, self.variant, self.gamma) > self.gamma_threshold)

    @property
    def minds_delta_size(self) -> bool:
        return self.gamma == "released" and 0 <= self.gamma_threshold < math.inf

    def remark(self, delta_rms: float, norms: Sequence[float]) -> str | None:
        return AT_THE_POLE if near_the_pole(norms) and self.is_heterogeneous(norms) else None

    def refined_delta(self, run: Run, base: Tensor, experts: Sequence[Tensor], stats: Stats, wide: bool) -> Tensor:
        """X of heterogeneous tasks, d_out x d_in: in float64 if `wide`, else what loses nothing by it in float32."""
        released = self.variant == "released"
        tiny = TINY if released else 0.0
        weights = [1.0 / (p + tiny) for p in stats.traces.tolist()]
        ridges = [self.eps * weight for weight in weights]
        divisor = float(stats.norms.mean()) + TINY if released else 1.0  # not in the paper
        tasks = Scaled(base, experts, stats.means, weights, ridges, divisor, released)
        return ace_refined.merged(run, tasks, self.refined(base.shape), "float64" if wide else self.precision)

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
            N = N + forms.mean_row(run, base, experts, means, ones, "F64")
            C = C + means.sum(dim=0).to(C.dtype)
        double = self.precision == "float64" or compute_code(base, *experts) == "F64"
        return KeptAce(S, N, C, len(experts), "F64" if double else "F32")

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        item = 8 if self.precision == "float64" else 4
        return 3 * 8 * columns + item * (columns**2 + 2 * rows * columns)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        if self.gamma_threshold < 0:  # else the weights tell whether they are refined, and the plan has not read them
            return ace_refined.flops(rows, columns, experts, self.refined(shape), self.variant == "released")
        return forms.flops(forms.cheapest(rows, columns, experts, double=True), rows, columns, experts)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        most = forms.scratch(rows, columns, experts)
        if self.gamma_threshold == math.inf:
            return most
        return max(most, ace_refined.scratch(rows, columns, experts, self.variant == "released"))


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
            "gamma",
            "choice",
            "released",
            "measure of heterogeneity; scale_free: one that no common factor of the task vectors changes",
            choices=("released", "scale_free"),
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
            merge["gamma"],
        )


METHODS = (Ace(),)
