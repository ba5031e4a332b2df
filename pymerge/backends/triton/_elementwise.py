"""Triton kernels for inner products of models, and for weighted sums of their vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.triton._arguments import on
from pymerge.common.shapes import Axis, vector_shape


def task_dots(base: Tensor | None, tensors: Sequence[Tensor], axis: Axis = "whole") -> Tensor:
    """`task_dots` in one pass over the inputs; columns are turned into rows first.

    The tensors share one dtype in the kernel; where they don't, they are upcast to float32.
    """
    from pymerge.kernels import task_dots as kernel

    shape = vector_shape(tensors[0].shape, axis)
    common = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32

    def vectors(tensor: Tensor) -> Tensor:
        matrix = tensor.reshape(shape)
        return (matrix.T if axis == "columns" else matrix).contiguous()

    with on(tensors[0].device):
        origin = None if base is None else vectors(base)
        dots: Tensor = kernel.launch(origin, [vectors(tensor.to(common)) for tensor in tensors])
    return dots


def combine_vectors(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Tensor,
    axis: Axis,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`combine_vectors` in one pass over the inputs."""
    from pymerge.kernels import combine_vectors as kernel

    like = tensors[0] if base is None else base
    shape = vector_shape(like.shape, axis)
    out = torch.empty(shape, dtype=out_dtype or like.dtype, device=like.device)
    origin = None if base is None else base.reshape(shape).contiguous()
    inputs = [tensor.reshape(shape).contiguous() for tensor in tensors]
    with on(like.device):
        kernel.launch(out, origin, inputs, weights.T.to(torch.float32).contiguous(), axis == "columns")
    return out.view(like.shape)
