"""ACE's spectral refinement: adds an isotropic term along the leading singular directions."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_matrix
from pymerge.ops._singular import leading_triplets


def check(X: Tensor, D: Tensor, k: int) -> None:
    """Raise ArgumentError unless X and D are matrices of one shape and 1 <= k <= min(shape)."""
    if X.ndim != 2:
        raise ArgumentError(f"spectral_refine: X has shape {tuple(X.shape)}, expected a matrix")
    check_matrix("spectral_refine", "D", D, (X.shape[0], X.shape[1]))
    if not 1 <= k <= min(X.shape):
        raise ArgumentError(f"spectral_refine: k is {k}; give 1 to {min(X.shape)} for shape {tuple(X.shape)}")


def reference(X: Tensor, D: Tensor, k: int) -> Tensor:
    """Return X + mean(s_1..s_k) U_k V_k^T with U S V^T the singular value decomposition of D + X.

    Args:
        X: preconditioned merge, d_out x d_in, float32 or float64.
        D: structural residual, same shape.
        k: number of leading singular directions, 1 to min(d_out, d_in).

    Computed in float64: the truncated polar factor amplifies errors by 1 / (s_k - s_{k+1}).
    Source: ACE-Merging, arXiv 2603.02945, spectral refinement.
    """
    U, s, V = leading_triplets(D.to(torch.float64) + X.to(torch.float64), k)
    return X + (s.mean() * (U @ V.mT)).to(X.dtype)


OP = FunctionOp("spectral_refine", check, reference, "ACE's isotropic term along the top-k singular directions")
