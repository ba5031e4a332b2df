"""Base and expert weights for tests: deltas of a decaying spectrum, any rank, any dtype. Seeded by the shape."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def make_weights(
    d_out: int,
    d_in: int,
    tasks: int,
    *,
    rank: int | None = None,
    rms: float = 5e-4,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """W_0 (d_out x d_in, std 0.02) and experts whose deltas have the given rms, growing by `spread` a task."""
    generator = torch.Generator().manual_seed(hash((d_out, d_in, tasks, rank or 0, seed)) % 2**31)
    base = 0.02 * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    experts = []
    for task in range(tasks):
        k = rank or min(d_out, d_in)
        left = torch.randn(d_out, k, generator=generator, dtype=torch.float64)
        right = torch.randn(k, d_in, generator=generator, dtype=torch.float64)
        delta = (left / torch.arange(1, k + 1)) @ right
        scale = rms * (1.0 + spread * task) / float(delta.square().mean().sqrt())
        experts.append((base + scale * delta).to(dtype))
    return base.to(dtype), experts


def as_float64(tensor: Tensor) -> np.ndarray:
    """The tensor's exact values in float64."""
    return tensor.to(torch.float64).numpy()


def relative_error(found: np.ndarray, expected: np.ndarray, scale: np.ndarray | None = None) -> float:
    """Frobenius norm of the difference over that of `scale` (default: of what was expected)."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected if scale is None else scale))
