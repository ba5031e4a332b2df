"""RegMean: weights whose outputs on each task's inputs are nearest to the task's own, from Grams of these inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Run, copy, mean_of_tasks
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import compute_dtype, task_vector
from pymerge.ops.pseudo_solve import PseudoSolve
from pymerge.ops.spd_solve import SpdSolve

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_GRAM = "mean, without Gram"


class Gram(Protocol):
    """Mean of x x^T over the inputs x of a weight in one model."""

    @property
    def where(self) -> str:
        """Whose it is, for messages."""

    @property
    def dtype(self) -> str:
        """Code of its dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes in a file; 0 in memory."""

    def read(self) -> Tensor:
        """The matrix, d_in x d_in, finite and symmetric. Raises CheckpointError, NonFiniteError, ArgumentError."""


@dataclass(frozen=True)
class NoGram:
    """Absence of a Gram from what was given for a model."""

    where: str


@dataclass(frozen=True)
class SolveGrams(SolveDelta):
    """X = (sum_t tau_t G_t) (sum_t G_t)^-1; where no inputs are, the mean of the tau_t."""

    grams: tuple[Gram, ...]  # in the order of the experts
    ratio: float
    label: ClassVar[str] = "regmean"

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        import torch

        rows, columns = base.shape
        mean = torch.zeros(rows, columns, dtype=torch.float64, device=base.device)
        for expert in experts:
            mean += task_vector(base, expert, None, torch.float64)
        mean /= len(experts)
        S, R = mean.new_zeros(columns, columns), torch.zeros_like(mean)
        for expert, each in zip(experts, self.grams, strict=True):
            G = each.read().to(base.device, torch.float64)
            if self.ratio != 1.0:
                G = self.ratio * G + torch.diag((1.0 - self.ratio) * G.diagonal())
            S += G
            R.addmm_(task_vector(base, expert, None, torch.float64) - mean, G)
        return (mean + self._solved(run, S, R)).to(compute_dtype(base, *experts))

    def _solved(self, run: Run, S: Tensor, R: Tensor) -> Tensor:
        """R S^-1; the minimum-norm solution where rounding of the Grams, as stored, decides S^-1."""
        cutoff = S.shape[0] * 2.0**-52 if all(each.dtype == "F64" for each in self.grams) else 2.0**-23
        try:
            X, condition = run(SpdSolve(S, R))
            if float(condition) < 1.0 / cutoff:
                return X
        except ArgumentError:  # not positive definite
            pass
        return run(PseudoSolve(S, R, cutoff))

    @property
    def bytes_beside(self) -> int:  # type: ignore[override]
        return sum(each.nbytes for each in self.grams)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        return experts * 2 * rows * columns**2 + 10 * columns**3 + 4 * rows * columns**2

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        # In float64: the mean, R, a task vector, its difference, X and a product; S, a Gram as it is read and as it is
        # used, factors or eigenvectors, and LAPACK's work.
        return 8 * (7 * rows * columns + 7 * columns**2)


class RegMean(SolverMethod):
    """Least squares on the inputs of each task, by their Grams, which `pymerge collect` takes from data."""

    name = "regmean"
    summary = "least squares on each linear weight's inputs, by Grams of data that pymerge collect takes"
    source = "RegMean, arXiv 2212.09849"
    parameters = (
        Parameter(
            "grams",
            "grams",
            "",
            "file of pymerge collect with the Grams of this model's inputs; in memory, matrices",
            scope="model",
            required=True,
            varies=False,
        ),
        Parameter(
            "reduce_non_diagonal_ratio",
            "number",
            1.0,
            "factor of the Grams' elements off the diagonal; 0 leaves the diagonal",
            minimum=0.0,
            maximum=1.0,
            varies=False,
        ),
        *SHARED_PARAMETERS,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        grams = values.model["grams"]
        if "" in grams:
            raise ArgumentError(
                "regmean needs Grams of the inputs of each model; give grams=[...], one for each: files of pymerge "
                "collect, or what they hold"
            )
        if not solvable or any(re.search(pattern, name) for pattern in values.merge["exclude"]):
            return super().action(name, solvable, values, experts)
        lacking = [each.where for each in grams if isinstance(each, NoGram)]
        if 0 < len(lacking) < experts:
            raise ArgumentError(
                f"has no Gram in {' and '.join(lacking)}, and has one for other models; collect it for all of them, or "
                "name the weight under 'exclude', which averages it"
            )
        if lacking:
            rest = copy() if values.merge["rest"] == "base" else mean_of_tasks(experts)
            return rest if values.merge["rest"] == "base" else replace(rest, label=WITHOUT_GRAM)
        return self.solve(values)

    def solve(self, values: Values) -> Action:
        return SolveGrams(values.merge["scale"], values.model["grams"], values.merge["reduce_non_diagonal_ratio"])


METHODS = (RegMean(),)
