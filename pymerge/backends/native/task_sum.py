"""`task_sum` in one pass over the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._products import write_task_sum
from pymerge.common.arrays import as_tensor
from pymerge.ops.task_gram import product_dtype
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: TaskSum, threads: int) -> Tensor:
    """The sum."""
    import torch

    base, experts = as_tensor(op.base), [as_tensor(expert) for expert in op.experts]
    total = torch.empty(base.shape, dtype=product_dtype(op.dtype, base, experts))
    write_task_sum(total, base, experts, op.weights, op.means, threads)
    return total
