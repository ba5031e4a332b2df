"""RegMean: weights whose outputs on each task's inputs are nearest to the task's own, from Grams of these inputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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
class GramToCome:
    """A Gram that data will give, once all that comes before the weight is merged."""

    where: str  # the folder of the data
    dtype: str
    nbytes: int

    def read(self) -> Tensor:
        """Nothing yet: ArgumentError."""
        raise ArgumentError(f"the inputs of {self.where} are not collected; merge files, by pymerge merge")


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


NON_DIAGONAL = Parameter(
    "reduce_non_diagonal_ratio",
    "number",
    1.0,
    "factor of the Grams' elements off the diagonal; 0 leaves the diagonal",
    minimum=0.0,
    maximum=1.0,
    varies=False,
)


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
        NON_DIAGONAL,
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
        return _without_gram(values, experts) if lacking else self.solve(values)

    def solve(self, values: Values) -> Action:
        return SolveGrams(values.merge["scale"], values.model["grams"], values.merge["reduce_non_diagonal_ratio"])


def _without_gram(values: Values, experts: int) -> Action:
    return copy() if values.merge["rest"] == "base" else replace(mean_of_tasks(experts), label=WITHOUT_GRAM)


class RegMeanPP(SolverMethod):
    """Least squares as RegMean's, on the inputs that each weight has behind blocks that are merged already.

    Args:
        seen: names of the weights whose inputs a network shows; None where nobody runs one.
    """

    name = "regmean_pp"
    summary = (
        "regmean block by block, on inputs that come from the blocks merged before, by running over each task's data"
    )
    source = "RegMean++, arXiv 2508.03121"
    parameters = (
        Parameter(
            "data",
            "folder",
            "",
            "folder of texts or images of this model's task, as pymerge collect takes it",
            scope="model",
            required=True,
            varies=False,
        ),
        NON_DIAGONAL,
        Parameter("samples", "integer", 256, "texts or images of each folder, the first ones", minimum=1, varies=False),
        Parameter("length", "integer", 512, "tokens of each text, the first ones", minimum=1, varies=False),
        Parameter("batch", "integer", 8, "samples of one shape that run at once", minimum=1, varies=False),
        *SHARED_PARAMETERS,
    )

    def __init__(self, seen: Collection[str] | None = None) -> None:
        self.seen = seen

    def seeing(self, names: Collection[str]) -> RegMeanPP:
        return RegMeanPP(names)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if self.seen is None:
            raise ArgumentError(
                "regmean_pp runs models over data as it merges, which needs their files; merge them with pymerge "
                "merge, or pymerge.merge"
            )
        if solvable and name not in self.seen and not any(re.search(each, name) for each in values.merge["exclude"]):
            return _without_gram(values, experts)
        return super().action(name, solvable, values, experts)

    def solve(self, values: Values) -> Action:
        return SolveGrams(values.merge["scale"], values.model["data"], values.merge["reduce_non_diagonal_ratio"])


METHODS = (RegMean(), RegMeanPP())
