"""`low_rank_adam` with one fused pass a step beside its products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import flat
from pymerge.ops.low_rank_adam import LowRankAdam
from pymerge.ops.wudi_adam import bias_corrections

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: LowRankAdam, threads: int) -> Tensor:
    """Rows x d_in, on one thread."""
    import torch

    from pymerge import _C

    D = op.P.new_zeros(op.P.shape[0], op.Q.shape[0])
    m, v, gradient, nothing = torch.zeros_like(D), torch.zeros_like(D), torch.empty_like(D), torch.zeros_like(D)
    state = flat(D), flat(m), flat(v), flat(gradient), flat(nothing)
    for step in range(1, op.iterations + 1):
        op.half_gradient(D, gradient)
        _C.wudi_adam_step(*state, *op.betas, *bias_corrections(step, op.betas), op.lr, op.eps, 1)
    return D
