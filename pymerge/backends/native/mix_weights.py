"""`mix_weights` in one pass over memory; low-rank factors are products, and PyTorch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import flat
from pymerge.backends.native._tasks import dense, pass_threads, sparse
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.routed.task_storage import DenseTasks, SparseTasks

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = frozenset({"F32", "F16", "BF16"})  # it computes in float32


def compute(op: MixWeights, threads: int) -> Tensor:
    """The mixed weights."""
    import torch

    if not isinstance(op.tasks, (DenseTasks, SparseTasks)) or not op.weight.is_contiguous():
        return op.reference()
    mixed = op.room()
    mix(op.tasks, mixed, op.weight, op.gates.to(torch.float32), slice(None), threads)
    return mixed


def mix(tasks: DenseTasks | SparseTasks, out: Tensor, origin: Tensor, gates: Tensor, rows: slice, threads: int) -> None:
    """Write W_0[rows] + sum_t g_kt tau_t[rows] to out[k] for K rows of float32 gates, all of them together.

    `origin` is W_0[rows], contiguous as `out` is (K x rows x d_in).
    """
    from pymerge import _C

    gates = gates.contiguous()
    rows_here, columns = origin.shape
    threads = pass_threads(tasks, rows_here * len(gates), threads)
    sizes = len(gates), rows_here, columns, threads
    if isinstance(tasks, DenseTasks):
        _C.mix_dense(flat(out), flat(origin), gates.data_ptr(), dense(tasks, rows), *sizes)
    else:
        _C.mix_sparse(flat(out), flat(origin), gates.data_ptr(), sparse(tasks, rows), *sizes)
