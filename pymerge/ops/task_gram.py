"""The weighted Gram matrix of all task vectors, straight from the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor, dtype_of
from pymerge.common.dtypes import code_of, torch_dtype
from pymerge.errors import ArgumentError
from pymerge.ops._op import (
    Op,
    check_length,
    check_matrix,
    check_task_tensors,
    compute_dtype,
    task_vector,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskGram(Op["Tensor"]):
    """S = sum_t w_t tau~_t^T tau~_t, d_in x d_in, symmetric; added in the order of the tasks.

    A batch of L layers of one shape has one more dimension in front, of base, experts, means and result. What a layer
    gives does not depend on the others.

    Source: A of WUDI-Merging's normal equations (arXiv 2503.08099), covariance of ACE-Merging (arXiv 2603.02945).
    """

    summary = "S = sum_t w_t tau_t^T tau_t, straight from the weights"
    takes_batches = True

    base: ArrayLike  # W_0, d_out x d_in or L x d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t of the same shape; each may have its own floating dtype
    weights: Sequence[float] | Tensor  # T numbers w_t, 0 leaves a task out; of a batch also [L, T] float64
    # [T, d_in] (of a batch [L, T, d_in]) to subtract, tau~_t = tau_t - 1 mu_t^T; None: tau~_t = tau_t
    means: Tensor | None = None
    dtype: str | None = None  # F32 or F64, of products and result; default: F32, F64 if an input is

    def check(self) -> None:
        """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
        base, weights, means = self.base, self.weights, self.means
        if len(base.shape) != 3:
            if not isinstance(weights, Sequence):
                raise ArgumentError(
                    f"task_gram: weights are a tensor of shape {tuple(weights.shape)} and the base is no batch"
                )
            return check_task_matrices("task_gram", base, self.experts, weights, means, self.dtype)
        check_task_tensors("task_gram", base, self.experts)
        layers, _, columns = base.shape
        if layers == 0:
            raise ArgumentError("task_gram: the batch has no layers; give at least one")
        if isinstance(weights, Sequence):
            check_length("task_gram", "weights", weights, len(self.experts))
        else:
            check_matrix("task_gram", "weights", weights, (layers, len(self.experts)))
            if dtype_of(weights) != "F64":
                raise ArgumentError(f"task_gram: weights are {weights.dtype}, expected torch.float64; convert them")
        if means is not None and tuple(means.shape) != (layers, len(self.experts), columns):
            raise ArgumentError(
                f"task_gram: means have shape {tuple(means.shape)}, expected {(layers, len(self.experts), columns)}"
            )
        check_product_dtype("task_gram", self.dtype)

    def reference(self) -> Tensor:
        """One task vector in memory at a time."""
        import torch

        layers = self.layers()
        if layers is not None:
            return self.stack([layer.reference() for layer in layers])
        base = as_tensor(self.base)
        dtype = product_dtype(self.dtype, base, self.experts)
        columns = base.shape[1]
        gram = torch.zeros(columns, columns, dtype=dtype, device=base.device)
        for index, (expert, weight) in enumerate(zip(self.experts, self.weights, strict=True)):
            if weight == 0.0:
                continue
            mean = None if self.means is None else self.means[index]
            tau = task_vector(base, as_tensor(expert), mean, dtype)
            gram.addmm_(tau.mT, tau, alpha=weight)
        return gram

    def layers(self) -> list[Op[Tensor]] | None:
        """One op for each layer of a batch; None of matrices."""
        if len(self.base.shape) != 3:
            return None
        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        rows = [self.weights] * len(base) if isinstance(self.weights, Sequence) else self.weights.tolist()
        return [
            TaskGram(
                matrix,
                [expert[layer] for expert in experts],
                row,
                None if self.means is None else self.means[layer],
                self.dtype,
            )
            for layer, (matrix, row) in enumerate(zip(base, rows, strict=True))
        ]

    def stack(self, results: Sequence[Tensor]) -> Tensor:
        """[L, d_in, d_in]."""
        import torch

        return torch.stack(tuple(results))


def check_task_matrices(
    op: str,
    base: ArrayLike,
    experts: Sequence[ArrayLike],
    weights: Sequence[float],
    means: Tensor | None,
    dtype: str | None,
) -> None:
    """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
    check_task_tensors(op, base, experts, ndim=2)
    check_length(op, "weights", weights, len(experts))
    if means is not None:
        check_matrix(op, "means", means, (len(experts), base.shape[1]))
    check_product_dtype(op, dtype)


def check_product_dtype(op: str, dtype: str | None) -> None:
    """Raise ArgumentError unless `dtype` can hold Grams."""
    if dtype is not None and code_of(dtype) not in ("F32", "F64"):
        raise ArgumentError(f"{op}: dtype {dtype} is not float32 or float64; Grams need at least float32")


def product_dtype(dtype: str | None, base: ArrayLike, experts: Sequence[ArrayLike]) -> torch.dtype:
    """The dtype of sums and products: the one asked for, or float32, float64 if an input is."""
    return compute_dtype(base, *experts) if dtype is None else torch_dtype(code_of(dtype))
