"""The spectrum of a merged delta scaled to what tasks ask for in each direction, and kept below a crest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix, check_task_tensors, task_vector
from pymerge.ops._singular import numerical_triplets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TemperSpectrum(Op["Tensor"]):
    """U diag(s'') V^T of X = U diag(s) V^T, d_out x d_in, in X's dtype; computed in float64.

    In the direction r task t asks for a_tr = u_r^T tau_t, all together with the energy E_r = sum_t ||a_tr||^2. The part
    that X has of it is p_r = s_r <v_r, sum_t a_tr> / E_r, and s'_r = s_r / max(p_r, 1 / T). Of what is above the crest
    c, `most` times the root mean square of all s', only the part is kept that tasks agree on: s''_r = c + (s'_r - c)
    max(g_r, 0) with g_r = (||sum_t a_tr||^2 - E_r) / ((T - 1) E_r), which is 1 where all ask for the same, as a task
    alone does, and 0 where what they ask for is orthogonal. Singular values that are rounding are left out.

    Nothing depends on the size of the deltas, and a task that hardly touched the weight counts for little.

    Source: pymerge, docs/method-weir.md; s' after Singular Value Calibration (arXiv 2602.05536), which has the mean of
    each task's part in place of that of all together.
    """

    summary = "singular values of a merged delta scaled to what tasks ask for, below a crest (weir)"

    delta: ArrayLike  # X, d_out x d_in, float32 or float64
    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    most: float = math.inf  # the crest in root mean squares, at least 1

    def check(self) -> None:
        """Raise ArgumentError unless all matrices have one shape and `most` is at least 1."""
        check_task_tensors("temper_spectrum", self.base, self.experts, ndim=2)
        check_matrix("temper_spectrum", "delta", as_tensor(self.delta), (self.base.shape[0], self.base.shape[1]))
        if not self.most >= 1:
            raise ArgumentError(f"temper_spectrum: most is {self.most}; give a number of at least 1")

    def reference(self) -> Tensor:
        """One decomposition, and a product for each task."""
        import torch

        X, base, tasks = as_tensor(self.delta), as_tensor(self.base), len(self.experts)
        U, s, V = numerical_triplets(X, min(X.shape))
        asked, energies = torch.zeros_like(V.mT), torch.zeros_like(s)  # rank x d_in; rank
        for expert in self.experts:
            responses = U.mT @ task_vector(base, as_tensor(expert), None, torch.float64)
            asked += responses
            energies += responses.square_().sum(dim=1)
        parts = s * (asked * V.mT).sum(dim=1)
        pairs = asked.square_().sum(dim=1) - energies
        del asked
        touched = energies > 0
        parts = torch.where(touched, parts / energies, 0.0).clamp(min=1.0 / tasks)
        agreed = torch.where(touched, pairs / energies, 0.0) / (tasks - 1) if tasks > 1 else torch.ones_like(s)
        s = s / parts
        if len(s) > 0 and math.isfinite(self.most):
            crest = self.most * s.square().mean().sqrt()
            s = torch.where(s > crest, crest + (s - crest) * agreed.clamp(0, 1), s)
        tempered: Tensor = (U * s) @ V.mT
        return tempered.to(X.dtype)
