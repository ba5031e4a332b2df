"""Solvers that merge task vectors in bases that all of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pymerge.common.blas import one_blas_thread
from pymerge.errors import ArgumentError
from pymerge.methods.actions import WHOLE_MODEL, Run, Solve
from pymerge.methods.kept import add_to_base
from pymerge.methods.selection import SCRATCH_BYTES
from pymerge.methods.solver import not_a_number
from pymerge.ops._op import task_vector

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.aligned import Aligned
    from pymerge.methods.core.deltas import Product
    from pymerge.methods.core.factors import Factors
    from pymerge.methods.core.tall import Matrix
    from pymerge.methods.core.together import Told


@dataclass(frozen=True)
class SolveAligned(Solve):
    """W_0 + scale * X, X by the factors of the task vectors; those of models get factors by their singular values."""

    scale: float
    merge: str
    density: float
    keys: tuple[int, ...]  # of the random numbers of each task
    scope: str  # of what density is a share
    told: Told | None = field(default=None, kw_only=True)  # by all matrices, where the scope is the model

    @property
    def has_core(self) -> bool:
        return True

    @property
    def minds_factors(self) -> bool:
        return True

    @property
    def of_model(self) -> bool:
        return self.scope == "model" and self.merge == "ties" and self.told is None

    @property
    def keeps_equal(self) -> bool:
        """Whether ties keeps all entries from the one after those of the density on."""
        return False

    @abstractmethod
    def aligned(self, tasks: Sequence[Factors]) -> Aligned:
        """The task vectors in bases that they share."""

    @abstractmethod
    def merged(self, parts: Sequence[Matrix]) -> Matrix:
        """Merge of their parts there, of which there is at least one entry."""

    def product(self, tasks: Sequence[Factors]) -> Product:
        """X."""
        aligned = self.aligned(tasks)
        return aligned.merged(self.merged(aligned.parts) if aligned.parts[0].size else aligned.parts[0])

    def together(self, run: Run, matrices: Sequence[Callable[[], Sequence[Factors]]], tasks: int) -> list[Solve]:
        from pymerge.methods.core.together import told

        def parts(load: Callable[[], Sequence[Factors]]) -> Sequence[Matrix]:
            found = load()
            if not all(task.finite for task in found):  # it will be refused, or nowhere finite, and tells nothing
                return [np.zeros(0)] * tasks
            return self.aligned(found).parts

        loads = [partial(parts, load) for load in matrices]
        known = told(run, loads, tasks, self.density, equal=self.keeps_equal)
        return [replace(self, told=each) for each in known]

    def by_told(self, parts: Sequence[Matrix]) -> Matrix:
        """TIES with the threshold and the majority of all matrices."""
        from pymerge.methods.core.entries import elected_mean, from_key

        assert self.told is not None
        kept = [from_key(*each) for each in zip(parts, self.told.keys, self.told.ends, strict=True)]
        return elected_mean(kept, self.told.most)

    def run_core(self, tasks: Sequence[Factors]) -> Product:
        return self.product(tasks).times(self.scale)

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        import torch

        from pymerge.methods.core.aligned import balanced

        if self.of_model:
            raise ArgumentError(f"{self.label}: {WHOLE_MODEL}")
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
        if not all(bool(tau.isfinite().all()) for tau in taus):
            return not_a_number(base, out_dtype)
        with one_blas_thread():
            X = self.product([balanced(tau.cpu().numpy()) for tau in taus]).whole()
        return add_to_base(base, torch.from_numpy(X).to(base.device), self.scale, out_dtype)

    def core_scratch(self, shape: tuple[int, int], rank: int, experts: int) -> int:
        counts = SCRATCH_BYTES * experts * self.of_model
        # What is aligned of each task, what is kept of it, and masks.
        return 8 * 4 * experts * rank * max(*shape, rank) + counts

    def drawn(self, parts: Sequence[Matrix]) -> Matrix:
        """DARE: the sum of what is drawn of each task."""
        from pymerge.methods.core.entries import drawn
        from pymerge.methods.core.factors import total_of

        pairs = zip(parts, self.keys, strict=True)
        total: Matrix = total_of(drawn(part, self.density, key) for part, key in pairs)
        return total

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        small, large = sorted(shape)
        return experts * (20 * small**2 * large + 4 * small * large**2) + 30 * (experts * small) ** 2 * small

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        small, large = sorted(shape)
        # In float64: task vectors, their factors and these joined, what is merged of each, cores, and LAPACK's work.
        return 8 * ((8 * experts + 6) * small * large + 6 * small * experts * small + 6 * small**2)
