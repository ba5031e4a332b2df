"""`spd_solve` with a block for each small system; those that shared memory can't hold go to PyTorch's library."""

from __future__ import annotations

from pymerge.backends.cuda._arguments import stream_of
from pymerge.backends.native._arguments import address, flat, optional
from pymerge.common.arrays import dtype_of
from pymerge.common.dtypes import NATIVE
from pymerge.ops.spd_solve import ITERATIONS, Solution, SpdSolve, settle, start_vector


def compute(op: SpdSolve, threads: int) -> Solution:
    """X and condition numbers, of matrices or of a batch."""
    import torch

    from pymerge import _cuda

    rows, columns = op.R.shape[-2:]
    if not 0 < columns <= _cuda.spd_solve_columns(NATIVE[dtype_of(op.S)]):
        return op.reference()
    layers = op.S.shape[:-2]
    S, R = op.S.contiguous(), op.R.contiguous()
    prior = None if op.prior is None else op.prior.contiguous()
    start = start_vector(S)
    X = torch.empty_like(R)
    conditions = torch.empty(layers, dtype=S.dtype, device=S.device)
    minors = torch.empty(layers, dtype=torch.int32, device=S.device)
    with torch.cuda.device(S.device):
        _cuda.spd_solve(
            flat(X),
            address(conditions),
            address(minors),
            flat(S),
            flat(R),
            optional(prior),
            flat(start),
            minors.numel(),
            rows,
            columns,
            ITERATIONS,
            stream_of(S),
        )
    return Solution(X, settle(S, conditions, minors))
