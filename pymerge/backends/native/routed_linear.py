"""`routed_linear` on the CPU: float32 products with mixed weights in C++, or C++ passes around PyTorch's products."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import Matrix, flat, matrix
from pymerge.backends.native._tasks import Dense, Sparse, dense, pass_threads, sparse
from pymerge.backends.native.mix_weights import mix
from pymerge.ops.routed.kernels import Kernels, Problem, TorchPasses, mixes_of
from pymerge.ops.routed.task_storage import DenseTasks, SparseTasks, Tasks
from pymerge.ops.routed_linear import RoutedLinear, run

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = frozenset({"F32", "F16", "BF16"})  # it computes in float32


def compute(op: RoutedLinear, threads: int) -> Tensor:
    """The layer's outputs."""
    return run(NativeKernels(threads), op)


class NativePasses(TorchPasses):
    """Passes in C++; low-rank factors are products, and PyTorch's."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_kt tau_t)[rows] to out[k] in one pass over memory, for all samples k together."""
        origin = weight[rows]
        if isinstance(tasks, (DenseTasks, SparseTasks)) and origin.is_contiguous():
            mix(tasks, out, origin, gates, rows, self._threads)
        else:
            super().mix(tasks, out, weight, gates, rows)

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task, partial sums in float64."""
        import torch

        from pymerge import _C

        if not isinstance(tasks, (DenseTasks, SparseTasks)):
            return super().dots(tasks, delta, rows)
        delta = delta.contiguous()
        out = torch.empty(tasks.count, dtype=torch.float64)
        rows_here, columns = delta.shape
        threads = pass_threads(tasks, rows_here, self._threads)
        if isinstance(tasks, DenseTasks):
            _C.dots_dense(out.data_ptr(), flat(delta), dense(tasks, rows), threads)
        else:
            _C.dots_sparse(out.data_ptr(), flat(delta), sparse(tasks, rows), rows_here, columns, threads)
        return out

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""
        import torch

        from pymerge import _C

        if not isinstance(tasks, SparseTasks):
            super().add_products(tasks, y, x, gates)
            return
        total = y.to(torch.float32)
        tokens, token_gates = x.to(torch.float32).contiguous(), gates.contiguous()
        _C.add_sparse_products(
            matrix(total),
            tokens.data_ptr(),
            token_gates.data_ptr(),
            sparse(tasks),
            len(tokens),
            *tasks.shape,
            self._threads,
        )
        if total is not y:
            y.copy_(total)


class NativeKernels(Kernels):
    """Float32 products that mix each part of a weight right before it is used; nothing as large as a weight is kept."""

    def __init__(self, threads: int, lanes: int | None = None) -> None:
        """Registers of so many floats, of those that this machine has; the results are the same bits."""
        super().__init__(NativePasses(threads))
        self._threads = threads
        self._lanes = _most_lanes() if lanes is None else lanes

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
        import torch

        return (
            x.dtype == gates.dtype == torch.float32
            and isinstance(problem.tasks, (DenseTasks, SparseTasks))
            and problem.weight.is_contiguous()
            and self._lanes > 0
            and bool(gates.isfinite().all())
        )

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
        _C.routed_product(*addresses, transposed, *_weight(problem), self._lanes, self._threads)
        return y

    def _gates_gradient(self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor) -> Tensor:
        """<dy_s^T x_s, tau_t>, partial sums in float64."""
        import torch

        from pymerge import _C

        runs = problem.runs
        x, dy = x.contiguous(), dy.contiguous()
        out = torch.empty(len(runs), problem.tasks.count, dtype=torch.float64)
        ends = [0, *(run.end for run in runs)]
        addresses = (out.data_ptr(), dy.data_ptr(), x.data_ptr(), ends)
        _C.routed_gates(*addresses, *_weight(problem), self._lanes, self._threads)
        chosen = torch.tensor([run.gate for run in runs], dtype=torch.int64)
        return torch.zeros_like(gates, dtype=torch.float64).index_add_(0, chosen, out).to(gates.dtype)


@cache
def _most_lanes() -> int:
    """Floats of the registers that products use; 0 on machines for which there are none."""
    from pymerge import _C

    return max(_C.routed_lanes(), default=0)


def _weight(problem: Problem) -> tuple[Matrix, Dense | Sparse, int, int]:
    """W_0 and its task vectors as csrc/bindings takes them, and the rows and columns of both."""
    weight, tasks = problem.weight, problem.tasks
    assert isinstance(tasks, (DenseTasks, SparseTasks))
    packed = dense(tasks) if isinstance(tasks, DenseTasks) else sparse(tasks)
    return flat(weight), packed, weight.shape[0], weight.shape[1]
