"""Iso-C and Iso-CTS: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, task_vector
from pymerge.ops._singular import Gram, Matrix, functions, numerical_triplets, orthogonalised, whole_gram

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Isotropic(Op["Tensor"]):
    """X = mean(s) U V^T, d_out x d_in, float32 (float64 if any input is), computed in float64.

    Iso-C (`common` 1): U diag(s) V^T is the singular value decomposition of sum_t tau_t; the mean is over all
    r = min(d_out, d_in) singular values, unless `over_rank`. Iso-CTS: only the leading triplets of the sum, about the
    share `common` of r, and equally many leading ones of each task's residual tau_t - U_c U_c^T tau_t for the rest; U
    and V are then made orthogonal. Directions whose singular value is rounding are left out: the published form, which
    gives them the same weight as all others, is not defined there.

    Source: Isotropic model merging, arXiv 2502.04959, equations 5 to 7 (Iso-C) and algorithm 2 (Iso-CTS).
    """

    summary = "sum of task vectors with equal singular values (Iso-C, Iso-CTS)"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    common: float = 1.0  # share of the common space; the number of task-specific triplets is a multiple of T
    over_rank: bool = False  # whether the mean is over the directions that are left, and not over all r

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape and `common` a share, 0 to 1."""
        check_task_tensors("isotropic", self.base, self.experts, ndim=2)
        if not 0 <= self.common <= 1:
            raise ArgumentError(f"isotropic: common is {self.common}; give a share from 0 to 1")

    def reference(self) -> Tensor:
        """One decomposition of the sum, for Iso-CTS also one a task and two of the sides."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
        X: Tensor = equalised(taus, self.common, (base.shape[0], base.shape[1]), self.over_rank)
        return X.to(compute_dtype(base, *experts))


def equalised(taus: Sequence[Matrix], common: float, shape: tuple[int, int], over_rank: bool = False) -> Matrix:
    """X of task vectors, or of their cores between orthonormal bases, in float64; `shape` is that of the weight."""
    left, right = equal_factors(taus, common, shape, over_rank)
    return left @ right.T


def equal_factors(
    taus: Sequence[Matrix], common: float, shape: tuple[int, int], over_rank: bool, gram: Gram = whole_gram
) -> tuple[Matrix, Matrix]:
    """Factors of `equalised`: mean(s) U and V."""
    xp = functions(taus[0])
    size, larger, tasks = min(shape), max(shape), len(taus)
    specific = min(round((size - int(size * common)) / tasks), size // tasks)  # triplets of each task
    total = taus[0]
    for tau in taus[1:]:
        total = total + tau
    U, s, V = numerical_triplets(total, size - specific * tasks, larger=larger, gram=gram)
    if specific > 0:
        parts = [numerical_triplets(tau - U @ (U.T @ tau), specific, xp.linalg.norm(tau), larger, gram) for tau in taus]
        U, s, V = (xp.concatenate(part, axis=-1) for part in zip(*parts, (U, s, V), strict=True))
        U, V = orthogonalised(U, gram), orthogonalised(V, gram)
    return s.sum() / max(1, len(s) if over_rank else size) * U, V
