"""Weighted sums of models: linear, task arithmetic, and the mean rule of the tensors that no solver touches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_length, check_task_tensors, compute_dtype


def check(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divisor: float = 1.0,
) -> None:
    """Raise ArgumentError unless shapes, devices and counts agree and all dtypes are floating point."""
    first = tensors[0] if base is None and tensors else base
    if first is None:
        raise ArgumentError("combine: no tensors were given; pass at least one")
    check_task_tensors("combine", first, tensors)
    check_length("combine", "weights", weights, len(tensors))
    if divisor == 0.0:
        raise ArgumentError("combine: the divisor is 0; give another number")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"combine: out_dtype {out_dtype} is not floating point; choose one that is")
    if out is not None:
        _check_out(out, first, out_dtype or first.dtype, tensors if base is None else [base, *tensors])


def _check_out(out: Tensor, like: Tensor, dtype: torch.dtype, inputs: Sequence[Tensor]) -> None:
    expected = (dtype, like.shape, like.device)
    if (out.dtype, out.shape, out.device) != expected or not out.is_contiguous():
        raise ArgumentError(
            f"combine: out is {out.dtype} {tuple(out.shape)} on {out.device}; give a contiguous tensor of {dtype} "
            f"{tuple(like.shape)} on {like.device}"
        )
    memory = out.untyped_storage().data_ptr()
    if memory and memory in {tensor.untyped_storage().data_ptr() for tensor in inputs}:
        raise ArgumentError("combine: out is in the memory of an input; give memory of its own")


def reference(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divisor: float = 1.0,
) -> Tensor:
    """Return S = (sum_t w_t W_t) / divisor, or W_0 + S with W_t - W_0 for W_t when a base is given.

    Args:
        base: W_0, any shape, or None for a plain weighted sum.
        tensors: T tensors W_t of the same shape; each may have its own floating dtype.
        weights: T numbers w_t, used as they are (normalising is the method's business).
        out_dtype: dtype of the result; default: the base's (or the first tensor's).
        out: contiguous tensor of that dtype and of the inputs' shape, to which the result is written.
        divisor: of the sum; the sum of the weights for an average, which is rounded less often than normalised weights.

    Accumulates in float32 (float64 if any input is) in the order of `tensors`, the base last, and rounds once at the
    end. A delta is formed after upcasting. Source: Task Arithmetic, arXiv 2212.04089; Model Soups, arXiv 2203.05482.
    """
    like = tensors[0] if base is None else base
    dtype = compute_dtype(like, *tensors)
    origin = None if base is None else base.to(dtype)
    total = torch.zeros_like(like, dtype=dtype)
    for tensor, weight in zip(tensors, weights, strict=True):
        value = tensor.to(dtype)
        total.add_(value if origin is None else value - origin, alpha=weight)
    if divisor != 1.0:
        total.div_(divisor)
    if origin is not None:
        total.add_(origin)
    return total.to(out_dtype or like.dtype) if out is None else out.copy_(total)


OP = Op("combine", check, reference, "weighted sums of weights or task vectors, one pass over the inputs")
