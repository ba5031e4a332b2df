"""`wudi_adam` with one kernel a step for all layers, the product on tensor cores and the update at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.cuda._arguments import stream_of
from pymerge.ops.wudi_adam import WudiAdam

if TYPE_CHECKING:
    from torch import Tensor

TAKES_BATCHES = True
DTYPES = frozenset({"F32", "F16", "BF16"})  # it computes in float32, on tensor cores


def compute(op: WudiAdam, threads: int) -> Tensor:
    """D of matrices or of a batch.

    Copying lr to the device waits for it. The steps do not: `_cuda.wudi_adam` can be captured in a graph.
    """
    import torch

    from pymerge import _cuda

    batch = op.batched()
    A, B = batch.A.contiguous(), batch.B.contiguous()
    layers, rows, columns = B.shape
    D, m, v = (torch.zeros_like(B) for _ in range(3))
    other = torch.empty_like(B)
    rates = torch.tensor(batch.rates, dtype=torch.float64).to(B.device)
    with torch.cuda.device(B.device):
        _cuda.wudi_adam(
            D.data_ptr(),
            other.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            rates.data_ptr(),
            layers,
            rows,
            columns,
            op.iterations,
            *op.betas,
            op.eps,
            stream_of(B),
        )
    merged = other if op.iterations % 2 else D
    return merged if op.B.ndim == 3 else merged[0]
