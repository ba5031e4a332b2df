"""The weighted Gram matrix of all task vectors, straight from the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_length, check_matrix, check_task_tensors, compute_dtype, task_vector


def check(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless matrices, weights and means agree, and `dtype` is float32 or float64."""
    check_task_tensors("task_gram", base, experts, ndim=2)
    check_length("task_gram", "weights", weights, len(experts))
    if means is not None:
        check_matrix("task_gram", "means", means, (len(experts), base.shape[1]))
    check_result_dtype(dtype)


def check_result_dtype(dtype: torch.dtype | None) -> None:
    """Raise ArgumentError unless `dtype` can hold Grams."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ArgumentError(f"task_gram: dtype {dtype} is not float32 or float64; Grams need at least float32")


def check_layers(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`check`, of one matrix or of a batch of layers (see `reference`)."""
    if base.ndim != 3:
        if isinstance(weights, Tensor):
            raise ArgumentError(
                f"task_gram: weights are a tensor of shape {tuple(weights.shape)} and the base is no batch"
            )
        return check(base, experts, weights, means, dtype)
    check_task_tensors("task_gram", base, experts)
    layers, _, columns = base.shape
    if layers == 0:
        raise ArgumentError("task_gram: the batch has no layers; give at least one")
    if isinstance(weights, Tensor):
        check_matrix("task_gram", "weights", weights, (layers, len(experts)))
        if weights.dtype != torch.float64:
            raise ArgumentError(f"task_gram: weights are {weights.dtype}, expected torch.float64; convert them")
    else:
        check_length("task_gram", "weights", weights, len(experts))
    if means is not None and tuple(means.shape) != (layers, len(experts), columns):
        raise ArgumentError(
            f"task_gram: means have shape {tuple(means.shape)}, expected {(layers, len(experts), columns)}"
        )
    check_result_dtype(dtype)


def each_layer(
    function: Callable[..., Tensor],
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[L, d_in, d_in]: what `function`, of matrices, returns for each layer of a batch."""
    rows = weights.tolist() if isinstance(weights, Tensor) else [weights] * len(base)
    grams = [
        function(matrix, [expert[layer] for expert in experts], row, None if means is None else means[layer], dtype)
        for layer, (matrix, row) in enumerate(zip(base, rows, strict=True))
    ]
    return torch.stack(grams)


def reference(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return S = sum_t w_t tau~_t^T tau~_t, d_in x d_in, symmetric.

    Args:
        base: W_0, d_out x d_in, floating point.
        experts: T tensors W_t like it.
        weights: T numbers w_t; 0 leaves a task out.
        means: [T, d_in] column means to subtract (tau~_t = tau_t - 1 mu_t^T), or None for tau~_t = tau_t.
        dtype: float32 or float64, of products and result; default float32, float64 if an input is.

    A batch of L layers of one shape is base and experts [L, d_out, d_in], means [L, T, d_in] and weights as above or
    [L, T] float64; the result is [L, d_in, d_in]. What a layer gives does not depend on the others.

    Source: A of WUDI-Merging's normal equations (arXiv 2503.08099), covariance of ACE-Merging (arXiv 2603.02945).
    """
    if base.ndim == 3:
        return each_layer(reference, base, experts, weights, means, dtype)
    dtype = dtype or compute_dtype(base, *experts)
    columns = base.shape[1]
    gram = torch.zeros(columns, columns, dtype=dtype, device=base.device)
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        if weight == 0.0:
            continue
        tau = task_vector(base, expert, None if means is None else means[index], dtype)
        gram.addmm_(tau.mT, tau, alpha=weight)
    return gram


OP = FunctionOp(
    "task_gram", check_layers, reference, "S = sum_t w_t tau_t^T tau_t, straight from the weights", each_layer
)
