"""One layer's weights, as fine-tuning leaves them, for the benchmarks of ops and of whole methods."""

from __future__ import annotations

import torch
from torch import Tensor

RANKS = (16, 32, 64)


def layer(
    d_out: int, d_in: int, tasks: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """A base of std 0.02, and experts with deltas of rank 16, 32, 64 and 1, 2, 3 % of it, plus 0.05 % of noise.

    Made in place: a process that measures memory must not have had its peak before.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    base = 0.02 * normal(d_out, d_in)
    experts = []
    for task in range(tasks):
        rank = min(RANKS[task % 3], d_out, d_in)
        left, right = normal(d_out, rank), normal(rank, d_in)
        norm = float(((left.mT @ left) * (right @ right.mT)).sum().sqrt())
        expert = base.clone().addmm_(left, right, alpha=0.01 * (1 + task % 3) * float(base.norm()) / norm)
        for rows in torch.split(expert, 256):
            rows.add_(normal(*rows.shape), alpha=1e-5)
        experts.append(expert.to(dtype))
    return base.to(dtype), experts


def sizes(shape: str) -> tuple[int, int, int]:
    """ "3072x768x8" as d_out, d_in and number of tasks."""
    d_out, d_in, tasks = map(int, shape.split("x"))
    return d_out, d_in, tasks
