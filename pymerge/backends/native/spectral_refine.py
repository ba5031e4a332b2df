"""`spectral_refine` with half of the Gram, and beside a float32 X products in float32 where these are exact enough."""

from __future__ import annotations

from operator import matmul

from pymerge.backends.native._inverse_root import SMALLEST
from pymerge.backends.native._products import half_gram, single_times
from pymerge.ops.spectral_refine import Refined, SpectralRefine, term_factors


def compute(op: SpectralRefine, threads: int) -> Refined:
    """X, its sensitivity and its margin."""
    import torch

    X, single = op.X, op.X.dtype == torch.float32 and min(op.X.shape) >= SMALLEST
    left, right, *doubts = term_factors(op.D.double().add(X), op.k, half_gram, single_times if single else matmul)
    if single:
        return Refined(torch.addmm(X, left.float(), right.float().mT), *doubts)
    return Refined(X + (left @ right.mT).to(X.dtype), *doubts)
