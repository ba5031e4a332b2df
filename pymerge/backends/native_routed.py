"""`routed_linear` on the CPU: float32 products with mixed weights in C++, or C++ passes around PyTorch's products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES, one_row
from pymerge.ops.routed.kernels import Kernels, Problem, TorchPasses, mixes_of
from pymerge.ops.routed.task_storage import DenseTasks, SparseTasks, Tasks
from pymerge.ops.routed_linear import run

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
        head = (one_row(out), one_row(origin), gates.data_ptr())
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
            _C.dots_dense(out.data_ptr(), one_row(delta), dense, _threads(tasks, len(delta)))
        else:
            sparse = _sparse(tasks, rows)
            rows_here, columns = delta.shape
            _C.dots_sparse(out.data_ptr(), one_row(delta), sparse, rows_here, columns, _threads(tasks, rows_here))
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
            (total.data_ptr(), DTYPE_CODES[total.dtype], total.stride(0)),
            tokens.data_ptr(),
            token_gates.data_ptr(),
            _sparse(tasks, slice(None)),
            len(tokens),
            *tasks.shape,
            torch.get_num_threads(),
        )
        if total is not y:
            y.copy_(total)


class NativeKernels(Kernels):
    """Float32 products that mix each part of a weight right before it is used; nothing as large as a weight is kept."""

    def __init__(self, lanes: int | None = None) -> None:
        """Registers of so many floats, of those that this machine has; the results are the same bits."""
        super().__init__(NativePasses())
        self._lanes = lanes

    def forward(self, problem: Problem, x: Tensor, gates: Tensor, biases: Tensor | None) -> Tensor:
        """y (N x d_out)."""
        if problem.form == "mixed" and self._has_tiles(problem, x, gates):
            return self._product(problem, x, gates, biases, transposed=False)
        return super().forward(problem, x, gates, biases)

    def backward(
        self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dL/dx, dL/dgates)."""
        if not self._has_tiles(problem, x, gates):
            return super().backward(problem, x, gates, dy, need_x, need_gates)
        dx = self._product(problem, dy, gates, None, transposed=True) if need_x else None
        dg = self._gates_gradient(problem, x, gates, dy) if need_gates else None
        if dg is not None and not dg.isfinite().all():  # 0 in place of an absent entry may have met infinity
            dg = super().backward(problem, x, gates, dy, False, True)[1]
        return dx, dg

    def _has_tiles(self, problem: Problem, x: Tensor, gates: Tensor) -> bool:
        """Whether the compiled products take this: not where 0 in place of an absent entry would become NaN."""
        return (
            x.dtype == gates.dtype == torch.float32
            and isinstance(problem.tasks, (DenseTasks, SparseTasks))
            and problem.weight.is_contiguous()
            and self.lanes > 0
            and bool(gates.isfinite().all())
        )

    @property
    def lanes(self) -> int:
        """Floats of the registers that products use; 0 on machines for which there are none."""
        from pymerge import _C

        if self._lanes is None:
            self._lanes = max(_C.routed_lanes(), default=0)
        return self._lanes

    def _product(
        self, problem: Problem, x: Tensor, gates: Tensor, biases: Tensor | None, *, transposed: bool
    ) -> Tensor:
        """x_s W_s^T + biases, or x_s W_s."""
        from pymerge import _C

        mixes = mixes_of(gates, problem.runs)
        chosen = [members[0].gate for _, members in mixes]
        ends = [0, *(members[-1].end for _, members in mixes)]
        x, gates = x.contiguous(), gates[chosen].contiguous()
        rows = None if biases is None else biases[chosen].contiguous()
        y = x.new_empty(len(x), problem.weight.shape[1 if transposed else 0])
        addresses = (y.data_ptr(), x.data_ptr(), ends, gates.data_ptr(), 0 if rows is None else rows.data_ptr())
        _C.routed_product(*addresses, transposed, *_weight(problem), self.lanes, torch.get_num_threads())
        return y

    def _gates_gradient(self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor) -> Tensor:
        """<dy_s^T x_s, tau_t>, partial sums in float64."""
        from pymerge import _C

        runs = problem.runs
        x, dy = x.contiguous(), dy.contiguous()
        out = torch.empty(len(runs), problem.tasks.count, dtype=torch.float64)
        ends = [0, *(run.end for run in runs)]
        addresses = (out.data_ptr(), dy.data_ptr(), x.data_ptr(), ends)
        _C.routed_gates(*addresses, *_weight(problem), self.lanes, torch.get_num_threads())
        chosen = torch.tensor([run.gate for run in runs], dtype=torch.int64)
        return torch.zeros_like(gates, dtype=torch.float64).index_add_(0, chosen, out).to(gates.dtype)


def _threads(tasks: Tasks, rows: int) -> int:
    """Threads for a pass over `rows` rows of all task vectors."""
    work = tasks.entries * rows // max(tasks.shape[0], 1) * (_SCATTERED if isinstance(tasks, SparseTasks) else 1)
    return max(1, min(torch.get_num_threads(), work // _WORK))


def _dense(tasks: DenseTasks, rows: slice) -> tuple[int, int, int, int]:
    """As csrc/bindings takes dense task vectors."""
    values = tasks.values
    first = rows.indices(values.shape[1])[0]
    address = values.data_ptr() + first * values.shape[2] * values.element_size()
    return address, DTYPE_CODES[values.dtype], values.stride(0), values.shape[0]


def _sparse(tasks: SparseTasks, rows: slice) -> tuple[int, int, int, bool, int, int, int]:
    """As csrc/bindings takes sparse task vectors."""
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


def _weight(problem: Problem) -> tuple[tuple[int, int, int], Any, int, int]:
    """As csrc/bindings takes W_0, its task vectors, its rows and its columns."""
    weight, tasks = problem.weight, problem.tasks
    assert isinstance(tasks, (DenseTasks, SparseTasks))
    packed = _dense(tasks, slice(None)) if isinstance(tasks, DenseTasks) else _sparse(tasks, slice(None))
    rows, columns = weight.shape
    return one_row(weight), packed, rows, columns


routed_linear = partial(run, NativeKernels())
