"""`normal_equations` with two d_out x d_in buffers and one d_in x d_in buffer for all tasks."""

from __future__ import annotations

from pymerge.backends.native._products import add_gram, mirror, write_task_sum
from pymerge.common.arrays import as_tensor
from pymerge.ops.normal_equations import NormalEquations, System, outputs_first
from pymerge.ops.task_gram import product_dtype


def compute(op: NormalEquations, threads: int) -> System:
    """A and B."""
    import torch

    base, experts, means = as_tensor(op.base), [as_tensor(expert) for expert in op.experts], op.means
    rows, columns = base.shape
    dtype = product_dtype(op.dtype, base, experts)
    A = torch.zeros(columns, columns, dtype=dtype)
    B = torch.zeros(rows, columns, dtype=dtype)
    tau = torch.empty(rows, columns, dtype=dtype)
    left = tau if op.origin is None else torch.empty_like(tau)
    gram = None if outputs_first(rows, columns) else torch.empty_like(A)
    ridges = [0.0] * len(experts) if op.ridges is None else op.ridges
    for index, (expert, weight, ridge) in enumerate(zip(experts, op.weights, ridges, strict=True)):
        if weight == 0.0 and ridge == 0.0:
            continue
        write_task_sum(tau, base, [expert], [1.0], None if means is None else means[index : index + 1], threads)
        if op.origin is not None:
            torch.sub(tau, op.origin, out=left)
        if gram is None:
            add_gram(A, tau, weight)
            B.addmm_(left @ tau.mT, tau, alpha=weight)
        else:
            add_gram(gram.zero_(), tau, 1.0)
            A.add_(mirror(gram), alpha=weight)
            B.addmm_(left, gram, alpha=weight)
        if ridge != 0.0:
            B.add_(left, alpha=ridge)
    if gram is None:
        mirror(A)
    A.diagonal().add_(sum(ridges))
    return System(A, B)
