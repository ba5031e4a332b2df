"""Solvers that find the merged delta of each matrix by itself, whatever may vary."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.actions import Kept, Run, Solve
from pymerge.methods.kept import KeptDelta, add_to_base, delta_bytes
from pymerge.methods.solver import not_a_number
from pymerge.ops.task_stats import TaskStats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SolveDelta(Solve):
    """W_0 + scale * X."""

    scale: float

    @abstractmethod
    def delta(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """X of finite inputs, d_out x d_in."""

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        if not _finite(run, base, experts):
            return not_a_number(base, out_dtype)
        return add_to_base(base, self.delta(run, base, experts), self.scale, out_dtype)

    def keep(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Kept | None:
        return KeptDelta(self.delta(run, base, experts)) if _finite(run, base, experts) else None

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return delta_bytes(shape)


class SolveTrimmedByAll(SolveDelta):
    """X of task vectors of which the largest elements are kept, wherever in the model they are."""

    @property
    @abstractmethod
    def kept_of_all(self) -> float | None:
        """Share of the elements of all weights with this very action that is kept; None where it asks no more."""

    @abstractmethod
    def knowing(self, thresholds: Sequence[float]) -> SolveTrimmedByAll:
        """This action, given the least magnitude that is kept of each task."""

    @property
    def beforehand(self) -> int:
        return 2 if self.kept_of_all is not None else 0


def _finite(run: Run, base: Tensor, experts: Sequence[Tensor]) -> bool:
    stats = run(TaskStats(base.flatten(1), [expert.flatten(1) for expert in experts]))  # of kernels as matrices
    return all(map(math.isfinite, stats.norms.tolist()))
