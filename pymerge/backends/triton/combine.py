"""`combine` in one pass over the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on, output
from pymerge.common.arrays import as_tensor
from pymerge.ops.combine import Combine

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: Combine, threads: int) -> Tensor:
    """The weighted sum."""
    from pymerge.kernels import combine as kernel

    out = output(op.out, op.like, op.out_dtype)
    base = None if op.base is None else as_tensor(op.base).contiguous()
    with on(out.device):
        kernel.launch(out, base, [as_tensor(tensor).contiguous() for tensor in op.tensors], op.weights, op.divisor)
    return out
