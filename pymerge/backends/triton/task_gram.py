"""`task_gram` with task vectors formed inside the tiles, lower triangle only, all layers in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends._matrices import as_batches, packed, rows_contiguous, weights_by_layer
from pymerge.backends.triton import interpreted
from pymerge.backends.triton._arguments import on
from pymerge.ops.task_gram import TaskGram

if TYPE_CHECKING:
    from torch import Tensor

TAKES_BATCHES = True


def compute(op: TaskGram, threads: int) -> Tensor:
    """S of matrices or of a batch.

    The experts share one dtype and one layout in the kernel; where they don't, they are copied to one.
    """
    import torch

    from pymerge.kernels import task_gram as kernel

    base, *experts = as_batches([op.base, *op.experts])
    layers, _, columns = base.shape
    common = experts[0].dtype if len({expert.dtype for expert in experts}) == 1 else torch.float32
    experts = [rows_contiguous(expert.to(common)) for expert in experts]
    if len({expert.stride() for expert in experts}) > 1:
        experts = [packed(expert) for expert in experts]
    out = torch.empty(layers, columns, columns, dtype=torch.float32, device=base.device)
    factors = weights_by_layer(op.weights, layers, out.device)
    means = None if op.means is None else op.means.to(torch.float32).contiguous()
    with on(base.device):
        kernel.launch(out, rows_contiguous(base), experts, factors, means, interpreted())
    return out if len(op.base.shape) == 3 else out[0]
