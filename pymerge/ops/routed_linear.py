"""Linear layers whose weight is mixed for each sample: y_b = x_b (W_0 + sum_t g_bt tau_t)^T + b_0 + sum_t g_bt db_t."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, compute_dtype
from pymerge.ops.task_storage import LowRankTasks, SparseTasks, Tasks

Form = Literal["auto", "mixed", "factored"]

# The cost model, in flops of a matrix product. Only which of two sums is the larger one is used.
_BYTE = 4.0  # flops in the time one byte comes from memory
_SCATTERED = 16.0  # flops in the time of one flop on an entry found by its index
# Elements of the mixed weight that exist at a time: its products find them in the second-level cache.
_PANEL = 2**18


class Run(NamedTuple):
    """Rows begin to end of x that share one row of the gates."""

    gate: int
    begin: int
    end: int


class Passes(Protocol):
    """The passes over task vectors that a backend may have of its own; signatures are those of Tasks."""

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_t tau_t)[rows] to `out`."""

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task."""

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""


class TorchPasses:
    """The passes in plain PyTorch."""

    def mix(self, tasks: Tasks, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_t tau_t)[rows] to `out`."""
        tasks.mix(out, weight, gates, rows)

    def dots(self, tasks: Tasks, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task."""
        return tasks.dots(delta, rows)

    def add_products(self, tasks: Tasks, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y += sum_t g_nt x tau_t^T."""
        tasks.add_products(y, x, gates)


class Problem(NamedTuple):
    """What does not change between forward and backward; gates have one row for each distinct index."""

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
            mixed = x.new_empty(rows.stop - rows.start, weight.shape[1])
            for gate, members in _mixes(gates, runs):
                self.passes.mix(tasks, mixed, weight, gate, rows)
                # One product a run, so that a sample's result does not depend on its neighbours.
                for run in members:
                    out = y[run.begin : run.end, rows]
                    if biases is None:
                        torch.mm(x[run.begin : run.end], mixed.mT, out=out)
                    else:
                        torch.addmm(biases[run.gate, rows], x[run.begin : run.end], mixed.mT, out=out)
        return y

    def backward(
        self, problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dL/dx, dL/dgates); the second without the biases' part."""
        if isinstance(problem.tasks, LowRankTasks) and problem.form == "factored":
            return _low_rank_backward(problem, x, gates, dy, need_x, need_gates)
        weight, tasks, runs, _ = problem
        # Sums over panels must not be rounded to 16 bits: there the whole weight is one panel.
        panels = _panels(weight) if x.dtype == gates.dtype else [slice(0, weight.shape[0])]
        dx = torch.zeros_like(x) if need_x else None
        dg = torch.zeros_like(gates) if need_gates else None
        for rows in panels:
            mixed = x.new_empty(rows.stop - rows.start, weight.shape[1])
            for gate, members in _mixes(gates, runs):
                if dx is not None:
                    self.passes.mix(tasks, mixed, weight, gate, rows)
                    for run in members:
                        dx[run.begin : run.end].addmm_(dy[run.begin : run.end, rows], mixed)
                if dg is not None:
                    for run in members:
                        delta = dy[run.begin : run.end, rows].mT @ x[run.begin : run.end]
                        dg[run.gate] += self.passes.dots(tasks, delta.to(gates.dtype), rows).to(gates.dtype)
        return dx, dg


class _RoutedLinear(torch.autograd.Function):
    """Gradients for x, gates and bias; weights and task vectors are frozen."""

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


def choose_form(tasks: Tasks, tokens: int, mixes: int, dtype: torch.dtype) -> Literal["mixed", "factored"]:
    """The cheaper form for `tokens` rows of x and `mixes` distinct merged weights.

    Counted are flops of matrix products and bytes, without the product with W_0 that both forms have: mixed reads the
    task vectors and writes and reads one float32 weight for each mix; factored multiplies every token with every
    entry, reads dense task vectors once more to convert them if they are stored in another dtype than x's, and pays
    more for an entry found by its index. A mix of low-rank factors is a matrix product.
    """
    elements = tasks.shape[0] * tasks.shape[1]
    stored = sum(tensor.nbytes for tensor in tasks.tensors().values())
    mixed = _BYTE * (stored + 12 * elements)
    factored = 2.0 * tokens * tasks.entries
    read = _BYTE * stored
    if isinstance(tasks, SparseTasks):
        mixed += 2.0 * _SCATTERED * tasks.entries
        factored *= _SCATTERED
    elif isinstance(tasks, LowRankTasks):
        mixed += 2.0 * elements * len(tasks.owners)
    elif tasks.dtype != dtype:
        read += _BYTE * 2 * dtype.itemsize * tasks.entries
    return "mixed" if mixes * mixed <= factored + read else "factored"


def run(
    kernels: Kernels,
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    tasks: Tasks,
    bias: Tensor | None = None,
    bias_tasks: Tensor | None = None,
    index: Sequence[int] | None = None,
    form: Form = "auto",
) -> Tensor:
    """`routed_linear` with the kernels of a backend."""
    flat = x.reshape(-1, x.shape[-1])
    runs = _runs(x, gates, index)
    chosen = choose_form(tasks, len(flat), len(runs), x.dtype) if form == "auto" else form
    problem = Problem(weight, tasks, runs, chosen)
    y: Tensor = _RoutedLinear.apply(flat, gates, bias, bias_tasks, problem, kernels)
    return y.view(*x.shape[:-1], weight.shape[0])


def check(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    tasks: Tasks,
    bias: Tensor | None = None,
    bias_tasks: Tensor | None = None,
    index: Sequence[int] | None = None,
    form: Form = "auto",
) -> None:
    """Raise ArgumentError unless shapes, dtypes and devices agree."""
    d_out, d_in = tasks.shape
    expected = {"weight": (weight, (d_out, d_in)), "bias": (bias, (d_out,)), "bias_tasks": (bias_tasks, (tasks.count, d_out))}
    for label, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ArgumentError(
                f"routed_linear: {label} has shape {tuple(tensor.shape)}, the task vectors need {shape}; give those of one layer"
            )
    if x.ndim != (3 if index is None else 2) or x.shape[-1] != d_in:
        wanted = f"batch x tokens x {d_in}" if index is None else f"tokens x {d_in}"
        raise ArgumentError(f"routed_linear: x has shape {tuple(x.shape)}, expected {wanted}; reshape it")
    if gates.ndim != 2 or gates.shape[1] != tasks.count:
        raise ArgumentError(
            f"routed_linear: gates have shape {tuple(gates.shape)}, expected samples x {tasks.count}; give one for each expert"
        )
    if index is None and gates.shape[0] not in (1, x.shape[0]):
        raise ArgumentError(
            f"routed_linear: {gates.shape[0]} rows of gates for {x.shape[0]} samples; give one each, or one for all"
        )
    if index is not None and len(index) != len(x):
        raise ArgumentError(f"routed_linear: {len(index)} sample indices for {len(x)} rows of x; give one each")
    if index and not 0 <= min(index) <= max(index) < len(gates):
        raise ArgumentError(
            f"routed_linear: sample indices go from {min(index)} to {max(index)}, gates have {len(gates)} rows; "
            "give indices of rows"
        )
    if form not in ("auto", "mixed", "factored"):
        raise ArgumentError(f"routed_linear: unknown form {form!r}; choose auto, mixed or factored")
    for label, tensor in {"x": x, "gates": gates, "bias": bias, "bias_tasks": bias_tasks, "weight": weight}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ArgumentError(f"routed_linear: {label} has dtype {tensor.dtype}; give floating point")
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(f"routed_linear: {label} is on {tensor.device}, x on {x.device}; move one")


def reference(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    tasks: Tasks,
    bias: Tensor | None = None,
    bias_tasks: Tensor | None = None,
    index: Sequence[int] | None = None,
    form: Form = "auto",
) -> Tensor:
    """Return y_b = x_b (W_0 + sum_t g_bt tau_t)^T + b_0 + sum_t g_bt db_t, in x's dtype.

    Args:
        x: B x S x d_in, or N x d_in with `index`.
        gates: B x T; or 1 x T, shared by all samples (batch-reduced).
        weight: W_0, d_out x d_in.
        tasks: the task vectors as they are stored.
        bias: b_0 (d_out), if the layer has one.
        bias_tasks: task vectors of the bias, T x d_out.
        index: for each row of x its row of the gates; consecutive equal ones are one sample.
        form: "mixed" merges the sample's weight and multiplies once; "factored" multiplies with W_0 and with each
            task vector; "auto" takes the cheaper by `choose_form`.

    Weights are mixed in float32 (float64 if x or gates are) and rounded once to x's dtype. Differentiable in x, gates
    and bias: dL/dg_bt = <dW_b, tau_t> + <db_b, db_t>. Source: WEMoE, arXiv 2402.00433, equations 5 and 6.
    """
    return run(_KERNELS, x, gates, weight, tasks, bias, bias_tasks, index, form)


def _runs(x: Tensor, gates: Tensor, index: Sequence[int] | None) -> tuple[Run, ...]:
    if index is not None:
        found, begin = [], 0
        for gate, members in groupby(index):
            end = begin + len(list(members))
            found.append(Run(gate, begin, end))
            begin = end
        return tuple(found)
    samples, tokens = x.shape[:2]
    if len(gates) == 1:
        return (Run(0, 0, samples * tokens),)
    return tuple(Run(sample, sample * tokens, (sample + 1) * tokens) for sample in range(samples))


def _mixes(gates: Tensor, runs: Sequence[Run]) -> list[tuple[Tensor, list[Run]]]:
    """Consecutive runs of equal gates, which share one mixed weight."""
    if len(runs) == 1:
        return [(gates[runs[0].gate], list(runs))]
    values = gates.tolist()
    grouped = [list(members) for _, members in groupby(runs, lambda run: values[run.gate])]
    return [(gates[members[0].gate], members) for members in grouped]


def _panels(weight: Tensor) -> list[slice]:
    """Rows whose mixed weight exists at a time; of the shape alone, so that results do not depend on the batch."""
    rows, columns = weight.shape
    size = max(16, _PANEL // max(columns, 1) // 16 * 16)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _biases(dtype: torch.dtype, gates: Tensor, bias: Tensor | None, bias_tasks: Tensor | None) -> Tensor | None:
    """b_0 + sum_t g_t db_t for each row of the gates; None without either."""
    if bias is None and bias_tasks is None:
        return None
    moved = gates @ bias_tasks.to(gates.dtype) if bias_tasks is not None else 0.0
    origin = bias.to(gates.dtype) if bias is not None else 0.0
    return (origin + gates.new_zeros(len(gates), 1) + moved).to(dtype)


def token_gates(gates: Tensor, runs: Sequence[Run]) -> Tensor:
    """The gates (or biases) of each row of x, from those of the runs."""
    rows = torch.tensor([run.gate for run in runs], device=gates.device)
    lengths = torch.tensor([run.end - run.begin for run in runs], device=gates.device)
    return gates[torch.repeat_interleave(rows, lengths)]


def _low_rank_backward(
    problem: Problem, x: Tensor, gates: Tensor, dy: Tensor, need_x: bool, need_gates: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Thin products only: no gradient of a weight is formed."""
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


_KERNELS = Kernels(TorchPasses())
OP = Op("routed_linear", check, reference, "linear layers whose weight is mixed from task vectors for each sample")
