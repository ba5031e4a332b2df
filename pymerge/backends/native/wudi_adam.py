"""`wudi_adam` with one GEMM and one fused pass a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import flat
from pymerge.ops.wudi_adam import WudiAdam, bias_corrections

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: WudiAdam, threads: int) -> Tensor:
    """D of matrices."""
    import torch

    from pymerge import _C

    A, B, betas, (rate,) = op.A.contiguous(), op.B.contiguous(), op.betas, op.rates
    D, m, v = torch.zeros_like(B), torch.zeros_like(B), torch.zeros_like(B)
    product = torch.empty_like(B)
    state = flat(D), flat(m), flat(v), flat(product), flat(B)
    for step in range(1, op.iterations + 1):
        torch.mm(D, A, out=product)
        _C.wudi_adam_step(*state, *betas, *bias_corrections(step, betas), rate, op.eps, threads)
    return D
