"""Merges on singular vectors: TSV-M, which makes those of the tasks orthogonal, and Iso-C and Iso-CTS, which make
singular values equal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action, Run
from pymerge.methods.base import Parameter, Values
from pymerge.methods.delta import SolveDelta
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import Op
from pymerge.ops.isotropic import Isotropic
from pymerge.ops.singular_sum import SingularSum

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Product, Spanned
    from pymerge.methods.core.factors import Factors


@dataclass(frozen=True)
class SolveSingular(SolveDelta):
    """W_0 + scale * X with X of an op that runs in float64."""

    @abstractmethod
    def op(self, base: Tensor, experts: Sequence[Tensor]) -> Op[Tensor]:
        """The op that gives X."""

    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        return run(self.op(base, experts))

    @property
    def has_core(self) -> bool:
        return True

    def decompositions(self, experts: int) -> int:
        """Number of decompositions, of matrices of the smaller side."""
        return experts + 2

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        # A Gram matrix, its eigenvectors and the other side's vectors; an SVD where the Gram cannot resolve them.
        return self.decompositions(experts) * (4 * small**2 * large + 9 * small**3)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        small, large = sorted(shape)
        # In float64: all task vectors, the vectors of both sides twice, and LAPACK's work.
        return 8 * ((experts + 5) * small * large + 8 * small**2)


class SumOrthogonal(SolveSingular):
    """TSV-M."""

    label: ClassVar[str] = "singular_sum"

    def op(self, base: Tensor, experts: Sequence[Tensor]) -> Op[Tensor]:
        return SingularSum(base, experts)

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.singular import orthogonal

        return orthogonal(tasks).times(self.scale)


@dataclass(frozen=True)
class MakeIsotropic(SolveSingular):
    """Iso-C, and Iso-CTS for a common space of less than all."""

    common: float
    over_rank: bool
    label: ClassVar[str] = "isotropic"

    def op(self, base: Tensor, experts: Sequence[Tensor]) -> Op[Tensor]:
        return Isotropic(base, experts, self.common, self.over_rank)

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.singular import isotropic

        return isotropic(tasks, self.common, self.over_rank).times(self.scale)

    def core_remark(self, shape: tuple[int, int], rank: int) -> str | None:
        least = min(shape)
        if self.over_rank or 2 * rank > least:
            return None
        return (
            f"the mean singular value is one over all {least} directions, of which these adapters have at most {rank}; "
            f"set mean_over: rank for an X that is {least / rank:.0f} times as large, or choose scale"
        )

    def decompositions(self, experts: int) -> int:
        return 1 if self.common == 1 else experts + 3


class TsvM(SolverMethod):
    """Task Singular Vectors: each task's leading singular vectors, made orthogonal across the tasks."""

    name = "tsv_m"
    summary = "leading singular vectors of each task, made orthogonal across tasks, data-free"
    source = "TSV-M, arXiv 2412.00081"
    parameters = SHARED_PARAMETERS

    def solve(self, values: Values) -> Action:
        return SumOrthogonal(values.merge["scale"])


_MEAN_OVER = Parameter(
    "mean_over",
    "choice",
    "all",
    "the mean singular value: of all directions of the weight, or of those that the task vectors have",
    choices=("all", "rank"),
    varies=False,
)


class IsoC(SolverMethod):
    """Iso-C: the sum of the task vectors with its singular values replaced by their mean."""

    name = "iso_c"
    summary = "sum of the task vectors with equal singular values, data-free"
    source = "Iso-C, arXiv 2502.04959"
    parameters = (_MEAN_OVER, *SHARED_PARAMETERS)

    def solve(self, values: Values) -> Action:
        return MakeIsotropic(values.merge["scale"], 1.0, values.merge["mean_over"] == "rank")


class IsoCts(SolverMethod):
    """Iso-CTS: as Iso-C on a common space, with directions of each task beside it."""

    name = "iso_cts"
    summary = "equal singular values on a common space and on directions of each task, data-free"
    source = "Iso-CTS, arXiv 2502.04959"
    parameters = (
        Parameter(
            "common_space_fraction",
            "number",
            0.8,
            "share of the singular directions taken from the sum of the task vectors",
            minimum=0.0,
            maximum=1.0,
            varies=False,
        ),
        _MEAN_OVER,
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return MakeIsotropic(merge["scale"], merge["common_space_fraction"], merge["mean_over"] == "rank")


METHODS = (TsvM(), IsoC(), IsoCts())
