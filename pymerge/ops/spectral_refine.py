"""ACE's spectral refinement: adds an isotropic term along the leading singular directions."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_matrix, one_thread

# Singular values below this share of the largest drown in the rounding of a float64 Gram (square root of 1e-16, with
# two digits to spare); then only a direct SVD resolves their directions.
_GRAM_LIMIT = 1e-6


def check(X: Tensor, D: Tensor, k: int) -> None:
    """Raise ArgumentError unless X and D are matrices of one shape and 1 <= k <= min(shape)."""
    if X.ndim != 2:
        raise ArgumentError(f"spectral_refine: X has shape {tuple(X.shape)}, expected a matrix")
    check_matrix("spectral_refine", "D", D, (X.shape[0], X.shape[1]))
    if not 1 <= k <= min(X.shape):
        raise ArgumentError(f"spectral_refine: k is {k}; give 1 to {min(X.shape)} for shape {tuple(X.shape)}")


def leading_polar_factor(M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (s[:k], U_k V_k^T) of M in float64, from the eigenvectors of the smaller Gram matrix.

    U_k V_k^T does not depend on the signs of singular vectors, nor on bases inside groups of equal singular values
    unless the group is cut by k.
    """
    M = M.to(torch.float64)
    tall = M.shape[0] >= M.shape[1]
    gram = M.mT @ M if tall else M @ M.mT
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0)[:k].clamp(min=0.0)
    s = values.sqrt()
    if float(s[-1]) <= _GRAM_LIMIT * float(s[0]):
        with one_thread():
            U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        return s[:k], U[:, :k] @ Vh[:k]
    basis = vectors.flip(1)[:, :k]
    if tall:
        return s, (M @ (basis / s)) @ basis.mT
    return s, basis @ ((basis / s).mT @ M)


def reference(X: Tensor, D: Tensor, k: int) -> Tensor:
    """Return X + mean(s_1..s_k) U_k V_k^T with U S V^T the singular value decomposition of D + X.

    Args:
        X: preconditioned merge, d_out x d_in, float32 or float64.
        D: structural residual, same shape.
        k: number of leading singular directions, 1 to min(d_out, d_in).

    Computed in float64: the truncated polar factor amplifies errors by 1 / (s_k - s_{k+1}).
    Source: ACE-Merging, arXiv 2603.02945, spectral refinement.
    """
    s, polar = leading_polar_factor(D.to(torch.float64) + X.to(torch.float64), k)
    return X + (s.mean() * polar).to(X.dtype)


OP = Op("spectral_refine", check, reference, "ACE's isotropic term along the top-k singular directions")
