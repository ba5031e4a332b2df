"""Weighted sums with weights of their own for each row or column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.common.shapes import Axis, vector_shape
from pymerge.errors import ArgumentError
from pymerge.ops import task_dots
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import compute_dtype
from pymerge.ops.task_dots import blocks


def check(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Tensor,
    axis: Axis,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ArgumentError unless the tensors agree and there is a weight for each tensor and vector."""
    task_dots.check(base, tensors, axis)
    rows, columns = vector_shape(tensors[0].shape, axis)
    expected = (columns if axis == "columns" else rows, len(tensors))
    if tuple(weights.shape) != expected:
        raise ArgumentError(f"combine_vectors: weights have shape {tuple(weights.shape)}, expected {expected}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"combine_vectors: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Tensor,
    axis: Axis,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return sum_t w_gt W_t for each vector g, or W_0 + sum_t w_gt (W_t - W_0) when a base is given.

    Args:
        base, tensors, out_dtype: as in `combine`.
        weights: [G, T] on the tensors' device, G the number of vectors along `axis` as in `task_dots`.

    Accumulates in float32 (float64 if any input is) in the order of `tensors`, and rounds once at the end.
    """
    like = tensors[0] if base is None else base
    dtype = compute_dtype(like, *tensors)
    rows, columns = vector_shape(like.shape, axis)
    flat = [tensor.reshape(rows, columns) for tensor in tensors]
    origin = None if base is None else base.reshape(rows, columns)
    merged = torch.empty(rows, columns, dtype=out_dtype or like.dtype, device=like.device)
    factors = weights.to(dtype).T[:, None, :] if axis == "columns" else weights.to(dtype).T[:, :, None]
    for place in blocks(rows, columns):
        start = torch.zeros_like(merged[place], dtype=dtype) if origin is None else origin[place].to(dtype)
        total = start.clone()
        here = (slice(None), *((slice(None), place[1]) if axis == "columns" else (place[0],)))
        for each, factor in zip(flat, factors[here], strict=True):
            total.addcmul_(each[place].to(dtype) - start, factor)
        merged[place] = total
    return merged.reshape(like.shape)


OP = FunctionOp("combine_vectors", check, reference, "weighted sums with weights for each row or column")
