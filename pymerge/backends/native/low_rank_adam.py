"""`low_rank_adam` with one fused pass a step beside its products, which are numpy's."""

from __future__ import annotations

from pymerge.backends.native._arguments import flat
from pymerge.common.arrays import Array, ArrayLike
from pymerge.common.blas import one_blas_thread
from pymerge.ops.low_rank_adam import LowRankAdam
from pymerge.ops.wudi_adam import bias_corrections


def compute(op: LowRankAdam, threads: int) -> ArrayLike:
    """Rows x d_in, on one thread; of arrays without PyTorch."""
    import numpy as np

    from pymerge import _C

    Q, C, P = (matrix.numpy() for matrix in (op.Q, op.C, op.P))
    D, m, v, gradient, nothing = np.zeros((5, len(P), len(Q)), P.dtype)
    at_D, at_m, at_v, at_product, at_B = (flat(Array.of(each)) for each in (D, m, v, gradient, nothing))
    with one_blas_thread():
        for step in range(1, op.iterations + 1):
            moved = D @ Q @ C
            moved -= P
            np.matmul(moved, Q.T, out=gradient)
            corrections = bias_corrections(step, op.betas)
            _C.wudi_adam_step(at_D, at_m, at_v, at_product, at_B, *op.betas, *corrections, op.lr, op.eps, 1)
    if isinstance(op.P, Array):
        return Array.of(D)
    import torch

    return torch.from_numpy(D)
