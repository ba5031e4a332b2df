"""The leading singular triplet of a matrix by products alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Columns that are iterated on: convergence goes with the gap to the singular value behind them. As many take hardly
# longer than one, since reading the matrix takes the time.
_COLUMNS = 8
_MOST_STEPS = 500
# Change of the leading direction in a step at which it is known: half of the digits would do for a merge in float32.
_CONVERGED = 1e-11


def leading_triplet(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (d_out), s and v (d_in) of a matrix in float64, by subspace iteration; zeros of one that is 0.

    The start is the same for all matrices of a shape. Where leading singular values are equal, so are all directions
    that they share, and which one is found follows from the start.
    """
    import torch

    rows, columns = M.shape
    if M.numel() == 0 or not bool(M.any()):
        return M.new_zeros(rows), M.new_zeros(()), M.new_zeros(columns)
    with one_thread():
        start = torch.randn(columns, min(_COLUMNS, rows, columns), generator=torch.Generator().manual_seed(0))
        V, before = torch.linalg.qr(start.to(M))[0], M.new_zeros(columns)
        for _ in range(_MOST_STEPS):
            left, s, right = torch.linalg.svd(M @ V, full_matrices=False)
            v = V @ right[0]
            v = -v if float(v @ before) < 0 else v
            if float((v - before).norm()) <= _CONVERGED:
                break
            before = v
            V = torch.linalg.qr(M.mT @ left)[0]
        Mv = M @ v
        s = Mv.norm()
        return Mv / s, s, v
