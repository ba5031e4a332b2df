"""TACT: the exact minimiser of the interference loss with covariances of trimmed task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import compute_dtype
from pymerge.ops.pseudo_solve import PseudoSolve
from pymerge.ops.trim_threshold import TrimThreshold
from pymerge.ops.trimmed_equations import TrimmedEquations

if TYPE_CHECKING:
    from torch import Tensor

# Times d_in: eigenvalues at or below this share of the largest count as 0. It is what torch.linalg.pinv has for
# float32, in which the method was published, and regularises it: so it is the same for every precision.
_PINV_EPS = 2.0**-23


@dataclass(frozen=True)
class SolveTrimmed(SolveDelta):
    """X = (sum_t tau_t C_t) (sum_t C_t)^+ with C_t of the largest elements of tau_t."""

    kappa: float
    label: ClassVar[str] = "tact"

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        numel = base.numel()
        count = min(numel, max(1, round(self.kappa * numel)))
        kept = run(TrimThreshold(base, experts, [count] * len(experts)))
        A, B = run(TrimmedEquations(base, experts, kept))
        return run(PseudoSolve(A, B, _PINV_EPS * base.shape[1])).to(compute_dtype(base, *experts))

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        return experts * 4 * rows * columns**2 + 9 * columns**3 + 4 * rows * columns**2

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        # In float64: A, a Gram, eigenvectors and LAPACK's work; B, a task vector, its keys and places, what is kept.
        return 8 * (6 * columns**2 + 8 * rows * columns)


class Tact(SolverMethod):
    """Trimmed ACTMat: the input covariance of each task is estimated from the largest elements of its task vector."""

    name = "tact"
    summary = "exact minimiser of interference with covariances of trimmed task vectors, data-free"
    source = "TACT, github.com/marawangamal/actmat"
    parameters = (
        Parameter(
            "kappa",
            "number",
            0.5,
            "share of each task vector's elements, the largest, that its covariance is made of; 1: ACTMat",
            above=0.0,
            maximum=1.0,
            varies=False,
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        return SolveTrimmed(values.merge["scale"], values.merge["kappa"])


METHODS = (Tact(),)
