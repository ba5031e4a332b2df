"""`routed_linear` with weights mixed inside the tiles of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on
from pymerge.ops.routed.kernels import Kernels, Problem, TorchPasses, token_gates
from pymerge.ops.routed.task_storage import DenseTasks
from pymerge.ops.routed_linear import RoutedLinear, run

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: RoutedLinear, threads: int) -> Tensor:
    """The layer's outputs."""
    return run(_RoutedKernels(TorchPasses()), op)


class _RoutedKernels(Kernels):
    """Dense task vectors in Triton; sparse and low-rank ones, and products for the gates' gradient, in PyTorch."""

    def forward(self, problem: Problem, x: Tensor, gates: Tensor, biases: Tensor | None) -> Tensor:
        """y (N x d_out)."""
        tasks = problem.tasks
        if not isinstance(tasks, DenseTasks):
            return super().forward(problem, x, gates, biases)
        return _routed(problem, x, problem.weight.contiguous(), tasks.values.contiguous(), gates, biases)

    def backward(
        self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dL/dx, dL/dgates): dL/dx is the same product with transposed weights."""
        tasks = problem.tasks
        if not isinstance(tasks, DenseTasks):
            return super().backward(problem, x, gates, dy, need_x, need_gates)
        dx = None
        if need_x:
            dx = _routed(problem, dy, problem.weight.contiguous().mT, tasks.values.contiguous().mT, gates, None)
        return dx, super().backward(problem, x, gates, dy, False, True)[1] if need_gates else None


def _routed(problem: Problem, x: Tensor, weight: Tensor, tasks: Tensor, gates: Tensor, biases: Tensor | None) -> Tensor:
    from pymerge.kernels import routed_linear as kernel

    out = x.new_empty(len(x), weight.shape[0])
    x, gates = x.contiguous(), gates.contiguous()
    with on(x.device):
        if problem.form == "factored":
            rows = None if biases is None else token_gates(biases, problem.runs).contiguous()
            kernel.launch_factored(out, x, weight, tasks, token_gates(gates, problem.runs), rows)
        else:
            runs = [list(run) for run in problem.runs]
            kernel.launch_mixed(out, x, weight, tasks, gates, None if biases is None else biases.contiguous(), runs)
    return out
