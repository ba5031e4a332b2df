"""`combine_vectors` in one pass over the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on, output
from pymerge.common.arrays import as_tensor
from pymerge.common.shapes import vector_shape
from pymerge.ops.combine_vectors import CombineVectors

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: CombineVectors, threads: int) -> Tensor:
    """The weighted sums."""
    import torch

    from pymerge.kernels import combine_vectors as kernel

    out = output(op.out, op.like, op.out_dtype)
    shape = vector_shape(out.shape, op.axis)
    origin = None if op.base is None else as_tensor(op.base).reshape(shape).contiguous()
    inputs = [as_tensor(tensor).reshape(shape).contiguous() for tensor in op.tensors]
    weights = torch.from_numpy(op.weights).T.to(device=out.device, dtype=torch.float32).contiguous()
    with on(out.device):
        kernel.launch(out.view(shape), origin, inputs, weights, op.axis == "columns")
    return out
