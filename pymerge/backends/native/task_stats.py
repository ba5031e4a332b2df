"""`task_stats` in one pass over each expert, sums in float64."""

from __future__ import annotations

from pymerge.backends.native._arguments import address, matrix, rows_contiguous
from pymerge.common.arrays import as_tensor
from pymerge.ops.task_stats import Stats, TaskStats

DTYPES = frozenset({"F32", "F16", "BF16"})  # it computes in float32


def compute(op: TaskStats, threads: int) -> Stats:
    """Norms, traces and means."""
    import torch

    from pymerge import _C

    base = rows_contiguous(as_tensor(op.base))
    experts = [rows_contiguous(as_tensor(expert)) for expert in op.experts]
    rows, columns = base.shape
    norms = torch.empty(len(experts), dtype=torch.float64)
    traces = torch.empty_like(norms)
    means = torch.empty(len(experts), columns)
    results = (address(norms), address(traces), address(means))
    _C.task_stats(*results, matrix(base), [matrix(expert) for expert in experts], rows, columns, threads)
    return Stats(norms, traces, means)
