"""`ram` in one pass, with the arithmetic of the C++ backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on, output
from pymerge.common.arrays import as_tensor
from pymerge.ops.ram import Ram

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: Ram, threads: int) -> Tensor:
    """W_0 and the mean of what is active."""
    from pymerge.kernels import ram as kernel

    out = output(op.out, op.base, op.out_dtype)
    base, experts = as_tensor(op.base).contiguous(), [as_tensor(expert).contiguous() for expert in op.experts]
    factors = [1.0] * len(experts) if op.factors is None else list(op.factors)
    with on(out.device):
        kernel.launch(out, base, experts, op.epsilon, factors)
    return out
