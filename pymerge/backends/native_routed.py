"""`routed_linear` on the CPU: C++ passes over the task vectors, PyTorch's products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.ops.routed_kernels import Kernels, TorchPasses
from pymerge.ops.routed_linear import run
from pymerge.ops.task_storage import DenseTasks, SparseTasks, Tasks

# Multiply-adds that are worth a thread of their own: a panel's pass is short, and waiting for a second thread on a busy
# machine costs more than it saves. An entry found by its index counts as several.
_WORK = 2**21
_SCATTERED = 8


class NativePasses(TorchPasses):
    """Passes in C++; low-rank factors are products, and PyTorch's."""

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_kt tau_t)[rows] to out[k] in one pass over memory, for all samples k together."""
        from pymerge import _C

        origin = weight[rows]
        if not isinstance(tasks, (DenseTasks, SparseTasks)) or not origin.is_contiguous():
            super().mix(tasks, out, weight, gates, rows)
            return
        gates = gates.contiguous()
        head = (out.data_ptr(), DTYPE_CODES[out.dtype], origin.data_ptr(), DTYPE_CODES[origin.dtype], gates.data_ptr())
        sizes = (len(gates), *origin.shape, _threads(tasks, len(origin) * len(gates)))
        if isinstance(tasks, DenseTasks):
            _C.mix_dense(*head, _dense(tasks, rows), *sizes)
        else:
            _C.mix_sparse(*head, _sparse(tasks, rows), *sizes)

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task, partial sums in float64."""
        from pymerge import _C

        if not isinstance(tasks, (DenseTasks, SparseTasks)):
            return super().dots(tasks, delta, rows)
        delta = delta.contiguous()
        out = torch.empty(tasks.count, dtype=torch.float64)
        if isinstance(tasks, DenseTasks):
            dense = _dense(tasks, rows)
            _C.dots_dense(out.data_ptr(), delta.data_ptr(), delta.numel(), dense, _threads(tasks, len(delta)))
        else:
            sparse = _sparse(tasks, rows)
            rows_here, columns = delta.shape
            _C.dots_sparse(out.data_ptr(), delta.data_ptr(), rows_here, columns, sparse, _threads(tasks, rows_here))
        return out

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""
        from pymerge import _C

        if not isinstance(tasks, SparseTasks):
            super().add_products(tasks, y, x, gates)
            return
        total = y.to(torch.float32)
        tokens, token_gates = x.to(torch.float32).contiguous(), gates.contiguous()
        _C.add_sparse_products(
            total.data_ptr(),
            total.stride(0),
            tokens.data_ptr(),
            token_gates.data_ptr(),
            len(tokens),
            *tasks.shape,
            _sparse(tasks, slice(None)),
            torch.get_num_threads(),
        )
        if total is not y:
            y.copy_(total)


def _threads(tasks: Tasks, rows: int) -> int:
    """Threads for a pass over `rows` rows of all task vectors."""
    work = tasks.entries * rows // max(tasks.shape[0], 1) * (_SCATTERED if isinstance(tasks, SparseTasks) else 1)
    return max(1, min(torch.get_num_threads(), work // _WORK))


def _dense(tasks: DenseTasks, rows: slice) -> tuple[int, int, int, int]:
    """As csrc/bindings.cpp takes dense task vectors."""
    values = tasks.values
    first = rows.indices(values.shape[1])[0]
    address = values.data_ptr() + first * values.shape[2] * values.element_size()
    return address, DTYPE_CODES[values.dtype], values.stride(0), values.shape[0]


def _sparse(tasks: SparseTasks, rows: slice) -> tuple[int, int, int, bool, int, int, int]:
    """As csrc/bindings.cpp takes sparse task vectors."""
    first = rows.indices(tasks.shape[0])[0]
    return (
        tasks.values.data_ptr(),
        DTYPE_CODES[tasks.values.dtype],
        tasks.columns.data_ptr(),
        tasks.columns.dtype == torch.int32,
        tasks.starts.data_ptr() + first * tasks.starts.element_size(),
        tasks.shape[0],
        tasks.count,
    )


# With the weights of a sample mixed in panels that stay in the cache.
routed_linear = partial(run, Kernels(NativePasses()))
