"""`isotropic` with half of each Gram; Iso-C of tall and wide weights by products alone, where that is exact enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._inverse_root import SMALLEST, inverse_root, is_long
from pymerge.backends.native._products import half_gram, write_task_sum
from pymerge.common.arrays import as_tensor
from pymerge.ops._op import compute_dtype, task_vector
from pymerge.ops._singular import WEIGHT_EPS
from pymerge.ops.isotropic import Isotropic, equal_factors

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: Isotropic, threads: int) -> Tensor:
    """X."""
    import torch

    base, experts = as_tensor(op.base), [as_tensor(expert) for expert in op.experts]
    dtype, shape = compute_dtype(base, *experts), (base.shape[0], base.shape[1])
    if op.common < 1.0:
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
    else:
        taus = [torch.empty(shape, dtype=torch.float64)]  # their sum
        write_task_sum(taus[0], base, experts, [1.0] * len(experts), None, threads)
        quick = _by_products(taus[0]) if dtype == torch.float32 and is_long(*shape) else None
        if quick is not None:
            return quick
    left, right = equal_factors(taus, op.common, shape, op.over_rank, half_gram)
    X: Tensor = (left.to(dtype) @ right.to(dtype).mT) if min(shape) >= SMALLEST else (left @ right.mT).to(dtype)
    return X


def _by_products(total: Tensor) -> Tensor | None:
    """X of Iso-C, of a sum that is overwritten then; None where that is not exact enough."""
    rows, columns = total.shape
    M = total if rows > columns else total.mT
    root = inverse_root(half_gram(M), (max(rows, columns) * WEIGHT_EPS) ** 2)
    if root is None:
        return None
    X = root.after(M).mul_(root.trace / min(rows, columns))
    return X if rows > columns else X.mT.contiguous()
