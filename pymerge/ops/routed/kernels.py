"""Forward and backward of `routed_linear` on flat inputs, from three passes that a backend may have of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pymerge.ops._op import compute_dtype
from pymerge.ops.routed.task_storage import LowRankTasks, Tasks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Elements of the mixed weight that exist at a time, where that is enough rows for a product to be fast: the product
# finds them in the cache.
_PANEL = 2**18
_PANEL_ROWS = 256
# Samples whose weights are mixed in one pass over the task vectors, which are larger than the cache.
_TOGETHER = 8


class Run(NamedTuple):
    """Rows begin to end of x that share one row of the gates."""

    gate: int
    begin: int
    end: int


class Passes(Protocol):
    """The passes over task vectors that a backend may have of its own; signatures are those of Tasks."""

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_kt tau_t)[rows] to out[k] for K rows of gates; out is K x rows x d_in, contiguous."""

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task."""

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""


class TorchPasses:
    """The passes in plain PyTorch."""

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_kt tau_t)[rows] to out[k] for K rows of gates."""
        for mixed, gate in zip(out, gates, strict=True):
            tasks.mix(mixed, weight, gate, rows)

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task."""
        return tasks.dots(delta, rows)

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""
        tasks.add_products(y, x, gates)


class Problem(NamedTuple):
    """The layer and the runs of its input, in forward and backward; gates have one row for each distinct index."""

    weight: Tensor
    tasks: Tasks
    runs: tuple[Run, ...]
    form: Literal["mixed", "factored"]


class Kernels:
    """Forward and backward of flat x (N x d_in), from the passes of a backend."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def forward(self, problem: Problem, x: Tensor, gates: Tensor, biases: Tensor | None) -> Tensor:
        """y (N x d_out), with row `run.gate` of `biases` added to the rows of each run."""
        import torch

        weight, tasks, runs, form = problem
        if form == "factored":
            y = x @ weight.to(x.dtype).mT
            self.passes.add_products(tasks, y, x, token_gates(gates, runs))
            if biases is not None:
                for run in runs:
                    y[run.begin : run.end] += biases[run.gate]
            return y
        y = x.new_empty(len(x), weight.shape[0])
        for rows in _panels(weight):
            for mixed, members in self._mixed(problem, gates, rows, x.dtype):
                # One product a run, so that a sample's result does not depend on its neighbours.
                for run in members:
                    out = y[run.begin : run.end, rows]
                    if biases is None:
                        torch.mm(x[run.begin : run.end], mixed.mT, out=out)
                    else:
                        torch.addmm(biases[run.gate, rows], x[run.begin : run.end], mixed.mT, out=out)
        return y

    def _mixed(
        self, problem: Problem, gates: Tensor, rows: slice, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[Run]]]:
        """Some rows of each mixed weight, and the runs that it belongs to. A weight is overwritten by later ones."""
        import torch

        mixes = mixes_of(gates, problem.runs)
        shape = (rows.stop - rows.start, problem.weight.shape[1])
        room = torch.empty(min(_TOGETHER, len(mixes)), *shape, dtype=dtype, device=gates.device)
        for start in range(0, len(mixes), _TOGETHER):
            some = mixes[start : start + _TOGETHER]
            mixed = room[: len(some)]
            self.passes.mix(problem.tasks, mixed, problem.weight, torch.stack([gate for gate, _ in some]), rows)
            yield from zip(mixed, (members for _, members in some), strict=True)

    def backward(
        self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dL/dx, dL/dgates); the second without the biases' part."""
        import torch

        if isinstance(problem.tasks, LowRankTasks) and problem.form == "factored":
            return _low_rank_backward(problem, x, gates, dy, need_x, need_gates)
        weight, tasks, runs, _ = problem
        # Sums over panels must not be rounded to 16 bits: there the whole weight is one panel.
        panels = _panels(weight) if x.dtype == gates.dtype else [slice(0, weight.shape[0])]
        dx = torch.zeros_like(x) if need_x else None
        dg = torch.zeros_like(gates) if need_gates else None
        for rows in panels:
            if dx is not None:
                for mixed, members in self._mixed(problem, gates, rows, x.dtype):
                    for run in members:
                        dx[run.begin : run.end].addmm_(dy[run.begin : run.end, rows], mixed)
            if dg is not None:
                for run in runs:
                    delta = dy[run.begin : run.end, rows].mT @ x[run.begin : run.end]
                    dg[run.gate] += self.passes.dots(tasks, delta.to(gates.dtype), rows).to(gates.dtype)
        return dx, dg


@cache
def routed_function() -> Any:
    """The autograd function of x, gates, bias, bias_tasks, problem and kernels. Made here: its base is PyTorch's.

    Gradients are those for x, gates and bias; weights and task vectors are frozen.
    """
    import torch
    from torch.autograd.function import once_differentiable

    class RoutedFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            gates: Tensor,
            bias: Tensor | None,
            bias_tasks: Tensor | None,
            problem: Problem,
            kernels: Kernels,
        ) -> Tensor:
            gates = gates.to(compute_dtype(x, gates))
            ctx.save_for_backward(x, gates, bias_tasks)
            ctx.problem, ctx.kernels = problem, kernels
            return kernels.forward(problem, x, gates, _biases(x.dtype, gates, bias, bias_tasks))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, gates, bias_tasks = ctx.saved_tensors
            need_x, need_gates, need_bias = ctx.needs_input_grad[:3]
            dy = dy.contiguous()
            dx, dg = ctx.kernels.backward(ctx.problem, x, gates, dy, need_x, need_gates)
            db = None
            if need_bias or (need_gates and bias_tasks is not None):
                sums = gates.new_zeros(len(gates), dy.shape[1])
                for run in ctx.problem.runs:
                    sums[run.gate] += dy[run.begin : run.end].sum(0, dtype=gates.dtype)
                db = sums.sum(0) if need_bias else None
                if dg is not None and bias_tasks is not None:
                    dg = dg + sums @ bias_tasks.to(gates.dtype).mT
            return dx, dg, db, None, None, None

    return RoutedFunction


def mixes_of(gates: Tensor, runs: Sequence[Run]) -> list[tuple[Tensor, list[Run]]]:
    """Consecutive runs of equal gates, which share one mixed weight."""
    if len(runs) == 1:
        return [(gates[runs[0].gate], list(runs))]
    values = gates.tolist()
    grouped = [list(members) for _, members in groupby(runs, lambda run: values[run.gate])]
    return [(gates[members[0].gate], members) for members in grouped]


def _panels(weight: Tensor) -> list[slice]:
    """Rows whose mixed weight exists at a time; of the shape alone, so that results do not depend on the batch."""
    rows, columns = weight.shape
    size = max(_PANEL_ROWS, _PANEL // max(columns, 1) // 16 * 16)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _biases(dtype: torch.dtype, gates: Tensor, bias: Tensor | None, bias_tasks: Tensor | None) -> Tensor | None:
    """b_0 + sum_t g_t db_t for each row of the gates; None without either."""
    import torch

    if bias is None and bias_tasks is None:
        return None
    # Row by row: a matrix product would round by the number of rows.
    moves = [] if bias_tasks is None else list(bias_tasks.to(gates.dtype))
    origin = torch.zeros_like(moves[0]) if bias is None else bias.to(gates.dtype)
    total = origin.repeat(len(gates), 1)
    for task, move in enumerate(moves):
        total.addcmul_(gates[:, task, None], move)
    return total.to(dtype)


def token_gates(gates: Tensor, runs: Sequence[Run]) -> Tensor:
    """The gates (or biases) of each row of x, from those of the runs."""
    import torch

    if len(runs) == 1:  # one sample, as in decoding: no tensors of indices
        return gates[runs[0].gate].expand(runs[0].end - runs[0].begin, -1).contiguous()
    rows = torch.tensor([run.gate for run in runs], device=gates.device)
    lengths = torch.tensor([run.end - run.begin for run in runs], device=gates.device)
    return gates[torch.repeat_interleave(rows, lengths)]


def _low_rank_backward(
    problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Thin products only: no gradient of a weight is formed."""
    import torch

    weight, tasks, runs, _ = problem
    assert isinstance(tasks, LowRankTasks)
    of_tokens = token_gates(gates, runs)
    thin = dy @ tasks.left.to(x.dtype)
    dx = dg = None
    if need_x:
        scaled = thin * of_tokens[:, tasks.owners].to(x.dtype)
        dx = (dy @ weight.to(x.dtype)).addmm_(scaled, tasks.right.to(x.dtype))
    if need_gates:
        single = (thin * (x @ tasks.right.to(x.dtype).mT)).to(gates.dtype)
        dg = torch.zeros_like(gates)
        for run in runs:
            dg[run.gate].index_add_(0, tasks.owners, single[run.begin : run.end].sum(0))
    return dx, dg
