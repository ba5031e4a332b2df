"""The Gram matrix of all rows of all task vectors: what solvers work on where those are fewer than the columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, task_vector
from pymerge.ops.task_gram import check_task_matrices, product_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stack(NamedTuple):
    """Scaled task vectors one under the other, N = T d_out rows, and the products of these rows."""

    Z: Tensor  # N x d_in: the rows of sqrt(w_t) tau~_t, task after task
    K: Tensor  # Z Z^T, N x N, symmetric positive semi-definite


@dataclass(frozen=True, eq=False)
class StackedGram(Op[Stack]):
    """Z and K = Z Z^T, whose block s, t is sqrt(w_s w_t) tau~_s tau~_t^T.

    The weighted Gram of `task_gram` is Z^T Z, and f(Z^T Z) of any row in the span of Z is a function of K: where
    T d_out < d_in it is the smaller matrix, and its rounding errors do not reach directions that Z lacks.
    """

    summary = "products of all rows of the task vectors, for weights with few outputs"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    weights: Sequence[float]  # T numbers w_t, at least 0
    means: Tensor | None = None  # [T, d_in] to subtract, tau~_t = tau_t - 1 mu_t^T; None: tau~_t = tau_t
    dtype: str | None = None  # F32 or F64, of products and results; default: F32, F64 if an input is

    def check(self) -> None:
        """Raise ArgumentError unless matrices, weights and means agree, and no weight is below 0."""
        check_task_matrices("stacked_gram", self.base, self.experts, self.weights, self.means, self.dtype)
        for index, weight in enumerate(self.weights):
            if not weight >= 0:
                raise ArgumentError(f"stacked_gram: weight {index} is {weight}; give numbers of at least 0")

    def reference(self) -> Stack:
        """All of the product."""
        base, experts, means = as_tensor(self.base), [as_tensor(expert) for expert in self.experts], self.means
        dtype = product_dtype(self.dtype, base, experts)

        def write(out: Tensor, task: int) -> None:
            out.copy_(task_vector(base, experts[task], None if means is None else means[task], dtype))

        Z = stacked(self, dtype, write)
        return Stack(Z, Z @ Z.mT)


def stacked(op: StackedGram, dtype: torch.dtype, write: Callable[[Tensor, int], None]) -> Tensor:
    """Z, of task vectors that `write` writes to the memory that it is given, for a task of this number."""
    import torch

    base = as_tensor(op.base)
    rows, columns = base.shape
    Z = torch.empty(len(op.experts) * rows, columns, dtype=dtype, device=base.device)
    for task, weight in enumerate(op.weights):
        block = Z[task * rows : (task + 1) * rows]
        write(block, task)
        if weight != 1.0:
            block.mul_(math.sqrt(weight))
    return Z
