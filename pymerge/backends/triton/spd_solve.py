"""`spd_solve` of small systems, all in one launch; those that registers can't hold go to PyTorch's library."""

from __future__ import annotations

from pymerge.backends.triton._arguments import on
from pymerge.ops.spd_solve import ITERATIONS, Solution, SpdSolve, settle, start_vector

DTYPES = frozenset({"F32", "F64"})


def compute(op: SpdSolve, threads: int) -> Solution:
    """X and condition numbers, of matrices or of a batch."""
    import torch

    from pymerge.kernels import spd_solve as kernel

    if not 0 < op.R.shape[-1] <= kernel.MOST_COLUMNS:
        return op.reference()
    S, R = op.S.contiguous(), op.R.contiguous()
    prior = None if op.prior is None else op.prior.contiguous()
    X = torch.empty_like(R)
    conditions = torch.empty(S.shape[:-2], dtype=torch.float64, device=S.device)
    minors = torch.empty(S.shape[:-2], dtype=torch.int32, device=S.device)
    with on(S.device):
        kernel.launch(X, conditions, minors, S, R, prior, start_vector(S), ITERATIONS)
    return Solution(X, settle(S, conditions, minors))
