"""Linear layers whose weight is mixed for each sample: y_b = x_b (W_0 + sum_t g_bt tau_t)^T + b_0 + sum_t g_bt db_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops.routed.kernels import Kernels, Problem, Run, TorchPasses, routed_function
from pymerge.ops.routed.task_storage import LowRankTasks, SparseTasks, Tasks, check_gates, check_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Form = Literal["auto", "mixed", "factored"]

# The cost model, in flops of a matrix product. Only which of two sums is the larger one is used.
_BYTE = 4.0  # flops in the time one byte comes from memory
_SCATTERED = 16.0  # flops in the time of one flop on an entry found by its index


@dataclass(frozen=True, eq=False)
class RoutedLinear(Op["Tensor"]):
    """y_b = x_b (W_0 + sum_t g_bt tau_t)^T + b_0 + sum_t g_bt db_t, in x's shape and dtype.

    Weights are mixed in float32 (float64 if x or gates are) and rounded once to x's dtype. Differentiable in x, gates
    and bias: dL/dg_bt = <dW_b, tau_t> + <db_b, db_t>. Source: WEMoE, arXiv 2402.00433, equations 5 and 6.
    """

    summary = "linear layers whose weight is mixed from task vectors for each sample"

    x: Tensor  # B x S x d_in, or N x d_in with `index`
    gates: Tensor  # B x T; or 1 x T, shared by all samples (batch-reduced)
    weight: Tensor  # W_0, d_out x d_in
    tasks: Tasks  # the task vectors as they are stored
    bias: Tensor | None = None  # b_0 (d_out), if the layer has one
    bias_tasks: Tensor | None = None  # task vectors of the bias, T x d_out
    # For each row of x its row of the gates; consecutive equal ones are one sample.
    index: Sequence[int] | None = None
    # "mixed" merges the sample's weight and multiplies once; "factored" multiplies with W_0 and with each task vector;
    # "auto" takes the cheaper by `choose_form`.
    form: Form = "auto"

    def check(self) -> None:
        """Raise ArgumentError unless shapes, dtypes and devices agree."""
        x, gates, tasks, index = self.x, self.gates, self.tasks, self.index
        check_layer("routed_linear", tasks, self.weight, self.bias, self.bias_tasks)
        d_in = tasks.shape[1]
        if x.ndim != (3 if index is None else 2) or x.shape[-1] != d_in:
            wanted = f"batch x tokens x {d_in}" if index is None else f"tokens x {d_in}"
            raise ArgumentError(f"routed_linear: x has shape {tuple(x.shape)}, expected {wanted}; reshape it")
        check_gates("routed_linear", tasks, gates)
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
        if self.form not in ("auto", "mixed", "factored"):
            raise ArgumentError(f"routed_linear: unknown form {self.form!r}; choose auto, mixed or factored")
        for label in ("x", "gates", "bias", "bias_tasks", "weight"):
            tensor = getattr(self, label)
            if tensor is not None and not tensor.is_floating_point():
                raise ArgumentError(f"routed_linear: {label} has dtype {tensor.dtype}; give floating point")
            if tensor is not None and tensor.device != x.device:
                raise ArgumentError(f"routed_linear: {label} is on {tensor.device}, x on {x.device}; move one")

    def reference(self) -> Tensor:
        """Compute by passes in plain PyTorch."""
        return run(Kernels(TorchPasses()), self)


def run(kernels: Kernels, op: RoutedLinear) -> Tensor:
    """`routed_linear` with the kernels of a backend."""
    x, gates, weight, tasks = op.x, op.gates, op.weight, op.tasks
    flat = x.reshape(-1, x.shape[-1])
    runs = _runs(x, gates, op.index)
    chosen = choose_form(tasks, len(flat), len(runs), x.dtype) if op.form == "auto" else op.form
    problem = Problem(weight, tasks, runs, chosen)
    y: Tensor = routed_function().apply(flat, gates, op.bias, op.bias_tasks, problem, kernels)
    return y.view(*x.shape[:-1], weight.shape[0])


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
