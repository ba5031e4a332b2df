"""Triton kernels for inner products of models, and for what goes element by element: combine_vectors, nearswap, ram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.triton._routed import on
from pymerge.common.shapes import Axis, vector_shape
from pymerge.ops.nearswap import LEAST_DIFFERENCE


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


def nearswap(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """`nearswap` in one pass, with the arithmetic of the C++ backend."""
    from pymerge.kernels import nearswap as kernel

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    with on(base.device):
        kernel.launch(out, base.contiguous(), expert.contiguous(), t, LEAST_DIFFERENCE)
    return out


def ram(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ram` in one pass, with the arithmetic of the C++ backend."""
    from pymerge.kernels import ram as kernel

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    with on(base.device):
        kernel.launch(out, base, inputs, epsilon, [1.0] * len(inputs) if factors is None else list(factors))
    return out


def ram_counts(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """`ram_counts` in one pass."""
    from pymerge.kernels import ram as kernel

    with on(base.device):
        counts: Tensor = kernel.counts(base.contiguous(), [expert.contiguous() for expert in experts], epsilon)
    return counts
