"""DC-Merge: task vectors merged entry by entry between bases that cover the leading directions of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pymerge.methods.actions import Action
from pymerge.methods.base import Parameter, Values
from pymerge.methods.singular import SolveSingular
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops._op import Op
from pymerge.ops.cover_sum import CoverSum, Smoothing, check_room

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Product, Spanned
    from pymerge.methods.core.factors import Factors


@dataclass(frozen=True)
class SumCovered(SolveSingular):
    """DC-Merge, of all directions that the tasks have room for, or of so many each."""

    rank: int | None
    smoothing: Smoothing
    core_share: float
    label: ClassVar[str] = "cover_sum"

    def check_shape(self, shape: tuple[int, int], experts: int) -> None:
        check_room(shape, experts, self.rank)

    def op(self, base: Tensor, experts: Sequence[Tensor]) -> Op[Tensor]:
        return CoverSum(base, experts, self.rank, self.smoothing, self.core_share)

    def run_core(self, tasks: Sequence[Factors]) -> Product | Spanned:
        from pymerge.methods.core.singular import covering

        return covering(tasks, self.rank, self.smoothing, self.core_share).times(self.scale)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        return super().flops(shape, experts) + experts * 4 * small**2 * large

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return super().scratch(shape, experts, native) + 8 * (experts + 2) * min(shape) ** 2  # the cores


class DcMerge(SolverMethod):
    """DC-Merge: directions of all tasks made orthogonal, and merged between them by the signs of entries."""

    name = "dc_merge"
    summary = "leading directions of all tasks, merged entry by entry between bases that cover them, data-free"
    source = "DC-Merge, arXiv 2603.06242"
    parameters = (
        Parameter(
            "variant",
            "choice",
            "full",
            "full: as for fine-tuned weights, an equal share of the directions for each task; "
            "lora: so many directions a task, whose singular values are smoothed",
            choices=("full", "lora"),
            varies=False,
        ),
        Parameter(
            "core_share",
            "number",
            1e-3,
            "share of the entries of each core that is kept, the largest",
            above=0.0,
            maximum=1.0,
            varies=False,
        ),
        Parameter(
            "smoothing",
            "choice",
            "avg",
            "of each task's singular values: all equal, or on a line; published for CLIP: avg (B/16, L/14), linear "
            "(B/32)",
            choices=("avg", "linear"),
            varies=False,
            only_with=("variant", "lora"),
        ),
        Parameter(
            "rank",
            "integer",
            16,
            "directions of each task",
            minimum=1,
            varies=False,
            only_with=("variant", "lora"),
        ),
        *SHARED_PARAMETERS,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        if merge["variant"] == "full":
            return SumCovered(merge["scale"], None, "none", merge["core_share"])
        return SumCovered(merge["scale"], merge["rank"], merge["smoothing"], merge["core_share"])


METHODS = (DcMerge(),)
