"""`sparse_combine` in one pass over the inputs, with the arithmetic of the C++ backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton import magnitude_mask
from pymerge.backends.triton._arguments import on, output
from pymerge.common.arrays import as_tensor
from pymerge.ops.sparse_combine import SparseCombine

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: SparseCombine, threads: int) -> Tensor:
    """The merged tensor; thresholds become masks first."""
    from pymerge.kernels import sparse_combine as kernel

    out = output(op.out, op.base, op.out_dtype)
    base, inputs = as_tensor(op.base).contiguous(), [as_tensor(expert).contiguous() for expert in op.experts]
    selection = op.selection()
    masks = op.bits if selection is None else magnitude_mask.compute(selection, threads).bits
    bits = None if masks is None else as_tensor(masks).contiguous()
    with on(out.device):
        kernel.launch(out, base, inputs, bits, op.sizes, op.weights, op.scale, op.elect, op.normalize)
    return out
