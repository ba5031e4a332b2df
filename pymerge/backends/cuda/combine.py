"""`combine` in one pass over the inputs, with the arithmetic of the C++ backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.cuda._arguments import stream_of
from pymerge.backends.native._arguments import flat, numbers, optional
from pymerge.backends.triton._arguments import output
from pymerge.common.arrays import as_tensor
from pymerge.ops.combine import Combine

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: Combine, threads: int) -> Tensor:
    """The weighted sum."""
    import torch

    from pymerge import _cuda

    out = output(op.out, op.like, op.out_dtype)
    base = None if op.base is None else as_tensor(op.base).contiguous()
    inputs = [as_tensor(tensor).contiguous() for tensor in op.tensors]
    with torch.cuda.device(out.device):
        _cuda.combine(
            flat(out), optional(base), [flat(each) for each in inputs], numbers(op.weights), op.divisor, stream_of(out)
        )
    return out
