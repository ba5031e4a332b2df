"""`wudi_adam` with one kernel a step, the product and the update; on a device, steps replayed as a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on
from pymerge.ops.wudi_adam import WudiAdam, bias_corrections

if TYPE_CHECKING:
    from torch import Tensor

TAKES_BATCHES = True


def compute(op: WudiAdam, threads: int) -> Tensor:
    """D of matrices or of a batch."""
    import torch

    from pymerge.kernels import wudi_adam as kernel

    batch = op.batched()
    B = batch.B
    corrections = (bias_corrections(step, op.betas) for step in range(1, op.iterations + 1))
    factors = [[(second, -rate / first) for rate in batch.rates] for first, second in corrections]
    schedule = torch.tensor(factors, dtype=torch.float32).to(B.device)
    with on(B.device):
        D: Tensor = kernel.launch(batch.A.contiguous(), B.contiguous(), schedule, op.betas, op.eps)
    return D if op.B.ndim == 3 else D[0]
