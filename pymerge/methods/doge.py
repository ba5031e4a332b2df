"""DOGE: task vectors corrected by projected gradient descent, trimmed by what all weights of the model tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveTrimmedByAll
from pymerge.methods.selection import magnitudes
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops.doge import Doge as DogeOp
from pymerge.ops.trim_threshold import TrimThreshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CorrectAll(SolveTrimmedByAll):
    """X of the op, with thresholds of the weight, or of all weights that have this very action."""

    factor: float
    density: float
    iterations: int
    lr: float
    subspace: int
    scope: Literal["model", "tensor"]
    thresholds: tuple[float, ...] | None = None  # of the model, once they are known
    label: ClassVar[str] = "doge"

    @property
    def kept_of_all(self) -> float | None:
        wanted = self.scope == "model" and self.thresholds is None and self.density < 1.0
        return self.density if wanted else None

    def knowing(self, thresholds: Sequence[float]) -> CorrectAll:
        return replace(self, thresholds=tuple(thresholds))

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        if self.kept_of_all is not None:
            raise ArgumentError(
                "doge trims by the elements of all weights, which nobody has looked at here; merge into a model, or "
                "give scope: tensor"
            )
        op = DogeOp(
            base,
            experts,
            self._thresholds(run, base, experts),
            self.factor,
            self.iterations,
            self.lr,
            self.subspace,
        )
        return run(op)

    def _thresholds(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Sequence[float]:
        if self.thresholds is not None:
            return self.thresholds
        numel = base.numel()
        if self.density >= 1.0 or numel == 0:
            return [0.0] * len(experts)
        counts = [kept_at_least(self.density, numel)] * len(experts)
        return magnitudes(run(TrimThreshold(base, experts, counts)).keys.tolist())

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        basis = 4 * shape[0] * (small // self.subspace)
        steps = self.iterations * (shape[0] * shape[1] * (4 * experts + 12) + basis * shape[1])
        return steps + (experts + 1) * (4 * small**2 * large + 9 * small**3)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        small, large = sorted(shape)
        # In float64: all task vectors twice, left vectors, X, D, moments, a gradient and temporaries of a step.
        return 8 * ((3 * experts + 10) * small * large + 8 * small**2)


def kept_at_least(density: float, numel: int) -> int:
    """Elements of which the smallest is the threshold; all that equal it are kept, as in the released code."""
    return min(numel, int(density * numel) + 1)


class DogeMethod(SolverMethod):
    """DOGE with task arithmetic (DOGE TA)."""

    name = "doge"
    summary = "task vectors corrected against interference by projected gradient descent, then trimmed, data-free"
    source = "DOGE, arXiv 2501.01230"
    parameters = (
        Parameter("iterations", "integer", 400, "Adam steps", minimum=0, varies=False),
        Parameter("lr", "number", 1e-4, "step size, not relative to the task vectors", above=0.0, varies=False),
        Parameter("lambda", "number", 0.07, "Frobenius norm to which each task vector is brought", varies=False),
        Parameter(
            "density",
            "number",
            0.3,
            "share of each task vector's elements, the largest, that are kept",
            minimum=0.0,
            maximum=1.0,
            varies=False,
        ),
        Parameter(
            "subspace",
            "integer",
            6,
            "gradients lose their part in 1 / subspace of the directions, those that tasks share",
            minimum=1,
            varies=False,
        ),
        Parameter(
            "scope",
            "choice",
            "model",
            "what density is a share of: all linear weights of the model, as published, or each tensor",
            choices=("model", "tensor"),
            varies=False,
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return CorrectAll(
            merge["scale"],
            merge["lambda"],
            merge["density"],
            merge["iterations"],
            merge["lr"],
            merge["subspace"],
            merge["scope"],
        )


METHODS = (DogeMethod(),)
