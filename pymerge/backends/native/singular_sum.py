"""`singular_sum` with half of each Gram, one task vector in memory at a time, and the longer side's vectors made
orthogonal by products alone where that is exact enough."""

from __future__ import annotations

from operator import matmul
from typing import TYPE_CHECKING

from pymerge.backends.native._inverse_root import SMALLEST, inverse_root, is_long
from pymerge.backends.native._products import half_gram, single_times, write_task_sum
from pymerge.common.arrays import as_tensor
from pymerge.ops._op import compute_dtype
from pymerge.ops._singular import numerical_triplets, turned_orthogonal
from pymerge.ops.singular_sum import SingularSum, kept_of_each, orthogonal_sum

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: SingularSum, threads: int) -> Tensor:
    """X."""
    import torch

    base, experts = as_tensor(op.base), [as_tensor(expert) for expert in op.experts]
    dtype, shape = compute_dtype(base, *experts), (base.shape[0], base.shape[1])
    count, triplets = kept_of_each(shape, len(experts)), []
    large = dtype == torch.float32 and min(shape) >= SMALLEST
    times = single_times if large and is_long(*shape) else matmul
    tau = torch.empty(shape, dtype=torch.float64)
    for expert in experts:
        write_task_sum(tau, base, [expert], [1.0], None, threads)
        triplets.append(numerical_triplets(tau, count, larger=max(shape), gram=half_gram, times=times))
    del tau
    X: Tensor
    if not large:
        X = orthogonal_sum(triplets, half_gram).to(dtype)
    else:
        U, s, V = (torch.cat(part, dim=-1) for part in zip(*triplets, strict=True))
        X = (_orthogonal(U) * s.to(dtype)) @ _orthogonal(V).mT
    return X


def _orthogonal(U: Tensor) -> Tensor:
    """O(U) in float32, by products alone for columns that are much longer than they are many."""
    import torch

    # Of so many columns of length 1 float32 has the digits that a root within the limit needs.
    root = inverse_root(half_gram(U.to(torch.float32)).double()) if is_long(*U.shape) else None
    if root is not None:
        return root.after(U)
    P, Q = turned_orthogonal(U, half_gram)
    X: Tensor = P.to(torch.float32) @ Q.to(torch.float32).mT
    return X
