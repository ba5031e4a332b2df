"""`magnitude_mask` in one pass over the weights."""

from __future__ import annotations

from pymerge.backends.triton._arguments import on
from pymerge.backends.triton._masks import base_or_zeros, on_device, unset_bits
from pymerge.common.arrays import as_tensor
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.magnitude_mask import MagnitudeMask


def compute(op: MagnitudeMask, threads: int) -> TaskMasks:
    """The masks."""
    from pymerge.kernels import magnitude_mask as kernel

    base = base_or_zeros(op.base, op.like)
    bits, inputs = unset_bits(len(op.experts), base), [as_tensor(expert).contiguous() for expert in op.experts]
    kept = on_device(op.kept, base.device)
    dropped = None if op.dropped is None else on_device(op.dropped, base.device)
    with on(base.device):
        before, after = kernel.launch(bits, base, inputs, kept, dropped)
    return TaskMasks(bits, before.cpu().numpy(), after.cpu().numpy())
