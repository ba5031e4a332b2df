"""Weighted sum of task vectors, without the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, task_vector
from pymerge.ops.task_gram import check_task_matrices, product_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskSum(Op["Tensor"]):
    """sum_t w_t tau~_t, d_out x d_in, contiguous; added in the order of the tasks.

    What `combine` gives, less W_0, whose size would cost a small sum its digits. Source: the start X_0 of WUDI-Merging
    (arXiv 2503.08099), the ridge terms of ACE-Merging (arXiv 2603.02945).
    """

    summary = "sum_t w_t tau_t, straight from the weights"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    weights: Sequence[float]  # T numbers w_t
    means: Tensor | None = None  # [T, d_in] to subtract, tau~_t = tau_t - 1 mu_t^T; None: tau~_t = tau_t
    dtype: str | None = None  # F32 or F64, of the sum and the result; default: F32, F64 if an input is

    def check(self) -> None:
        """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
        check_task_matrices("task_sum", self.base, self.experts, self.weights, self.means, self.dtype)

    def reference(self) -> Tensor:
        """One task vector in memory at a time."""
        import torch

        base = as_tensor(self.base)
        dtype = product_dtype(self.dtype, base, self.experts)
        total = torch.zeros(base.shape, dtype=dtype, device=base.device)
        for index, (expert, weight) in enumerate(zip(self.experts, self.weights, strict=True)):
            mean = None if self.means is None else self.means[index]
            total.add_(task_vector(base, as_tensor(expert), mean, dtype), alpha=weight)
        return total
