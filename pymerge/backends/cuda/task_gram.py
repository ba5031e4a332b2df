"""`task_gram` on tensor cores, task vectors formed on the way; lower triangle only, all layers in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends._matrices import as_batches, rows_contiguous, weights_by_layer
from pymerge.backends.cuda._arguments import layers_argument, stream_of
from pymerge.ops.task_gram import TaskGram

if TYPE_CHECKING:
    from torch import Tensor

TAKES_BATCHES = True
DTYPES = frozenset({"F32", "F16", "BF16"})  # it computes in float32, on tensor cores


def compute(op: TaskGram, threads: int) -> Tensor:
    """S of matrices or of a batch."""
    import torch

    from pymerge import _cuda

    base, *experts = (rows_contiguous(batch) for batch in as_batches([op.base, *op.experts]))
    layers, rows, columns = base.shape
    out = torch.empty(layers, columns, columns, dtype=torch.float32, device=base.device)
    factors = weights_by_layer(op.weights, layers, base.device)
    means = None if op.means is None else op.means.to(torch.float32).contiguous()
    with torch.cuda.device(out.device):
        _cuda.task_gram(
            out.data_ptr(),
            layers_argument(base),
            [layers_argument(expert) for expert in experts],
            factors.data_ptr(),
            0 if means is None else means.data_ptr(),
            layers,
            rows,
            columns,
            stream_of(out),
        )
    return out if len(op.base.shape) == 3 else out[0]
