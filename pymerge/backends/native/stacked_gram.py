"""`stacked_gram` with half of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._products import add_gram, mirror, write_task_sum
from pymerge.common.arrays import as_tensor
from pymerge.ops.stacked_gram import Stack, StackedGram, stacked
from pymerge.ops.task_gram import product_dtype

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: StackedGram, threads: int) -> Stack:
    """Z and K."""
    import torch

    base, experts, means = as_tensor(op.base), [as_tensor(expert) for expert in op.experts], op.means
    dtype = product_dtype(op.dtype, base, experts)

    def write(out: Tensor, task: int) -> None:
        shift = None if means is None else means[task : task + 1]
        write_task_sum(out, base, [experts[task]], [1.0], shift, threads)

    Z = stacked(op, dtype, write)
    K = torch.zeros(len(Z), len(Z), dtype=dtype)
    add_gram(K, Z.mT, 1.0)
    return Stack(Z, mirror(K))
