"""Task vectors of a linear weight (each d_out x d_in) made small: pruned to their large entries, or of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError
from pymerge.ops._op import one_thread
from pymerge.ops.routed.task_storage import LowRankTasks, SparseTasks

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def magnitude_quantile(magnitudes: Tensor, ratio: float) -> Tensor:
    """The linear-interpolated quantile of float32 or float64 values, by selection: any number of them, no sort.

    torch.quantile computes the same and refuses more than 2^24 elements.
    """
    import numpy as np
    import torch

    flat = magnitudes.flatten()
    place = ratio * (flat.numel() - 1)
    below = math.floor(place)
    above = min(below + 1, flat.numel() - 1)
    if flat.device.type == "cpu":
        # NumPy's selection stays linear for sorted values, PyTorch's does not.
        parted = torch.from_numpy(np.partition(flat.numpy(), (below, above)))
        low, high = parted[below], parted[above]
    else:
        low, high = flat.kthvalue(below + 1).values, flat.kthvalue(above + 1).values
    return torch.lerp(low, high, place - below)


def prune(tau: Tensor, ratio: float) -> Tensor:
    """Boolean mask of the entries kept: |tau| > quantile(|tau|, ratio), strictly.

    Ratio 0 drops the smallest magnitude only, ratio 1 everything. Source: E-WEMoE, arXiv 2410.21804, section 3.3.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ArgumentError(f"prune: ratio is {ratio}; give a number from 0 to 1")
    magnitudes = tau.abs()
    if tau.numel() == 0:
        return magnitudes > 0
    return magnitudes > magnitude_quantile(magnitudes, ratio)


def pruned_tasks(taus: Sequence[Tensor], ratio: float, dtype: torch.dtype) -> SparseTasks:
    """The task vectors (each d_out x d_in) pruned one by one; values rounded to `dtype` afterwards."""
    return sparse_tasks(taus, [prune(tau, ratio) for tau in taus], dtype)


def sparse_tasks(taus: Sequence[Tensor], kept: Sequence[Tensor], dtype: torch.dtype) -> SparseTasks:
    """The entries of each task vector (d_out x d_in) that its mask keeps, in `dtype`."""
    parts = [(tau[mask].to(dtype), mask.nonzero()[:, 1], mask.sum(1)) for tau, mask in zip(taus, kept, strict=True)]
    return SparseTasks.from_parts(parts, (taus[0].shape[0], taus[0].shape[1]))


def low_rank_tasks(
    taus: Sequence[Tensor], dtype: torch.dtype, *, rank: int | None = None, energy: float | None = None
) -> LowRankTasks:
    """Truncated SVD of each task vector (d_out x d_in): to `rank`, or to the fewest that hold `energy` of ||tau||^2.

    Factors share the singular values' square roots; they are computed in float64, on one thread (the same bits for any
    number of them), and rounded to `dtype`.
    """
    import torch

    if (rank is None) == (energy is None):
        raise ArgumentError("low rank: give either rank or energy, not both and not neither")
    if rank is not None and rank < 1:
        raise ArgumentError(f"low rank: rank is {rank}; give 1 or more")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ArgumentError(f"low rank: energy is {energy}; give a share above 0 and up to 1")
    lefts, rights, owners = [], [], []
    for task, tau in enumerate(taus):
        with one_thread():
            u, s, vt = torch.linalg.svd(tau.to(torch.float64), full_matrices=False)
        if energy is not None:
            shares = s.square().cumsum(0)
            wanted = energy * shares[-1] if len(shares) else shares.sum()
            kept = int((shares < wanted).sum()) + 1 if float(wanted) > 0 else 0
        else:
            kept = int(rank or 0)
        root = s[:kept].sqrt()
        lefts.append((u[:, :kept] * root).to(dtype))
        rights.append((root[:, None] * vt[:kept]).to(dtype))
        owners.append(torch.full((len(root),), task, dtype=torch.int64, device=tau.device))
    return LowRankTasks(torch.cat(lefts, 1), torch.cat(rights), torch.cat(owners), len(taus))
