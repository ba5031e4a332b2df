"""Triton kernels on NVIDIA devices (pymerge.kernels), or on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.native import rows_contiguous
from pymerge.ops.routed_kernels import Kernels, Problem, TorchPasses, token_gates
from pymerge.ops.routed_linear import Form, run
from pymerge.ops.task_storage import DenseTasks, Tasks

NAME = "triton"

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _interpreted() -> bool:
    """True if Triton runs kernels on the CPU, for tests; Triton reads the variable when it defines them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot compute on this device; None if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not load ({error}); install it: pip install 'pymerge-engine[triton]'"
    if device.type != "cuda" and not _interpreted():
        return f"Triton needs an NVIDIA device and the tensors are on {device}; use --device cuda"
    return None


def implementations() -> Mapping[str, Callable[..., Any]]:
    """The ops with a Triton kernel."""
    return {"combine": combine, "task_gram": task_gram, "routed_linear": routed_linear}


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """A reason if the kernels do not know one of the dtypes."""
    unknown = sorted(str(dtype) for dtype in dtypes - _DTYPES)
    return f"{', '.join(unknown)} is not one of float32, float16, bfloat16" if unknown else None


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`combine` in one pass over the inputs."""
    from pymerge.kernels import combine as kernel

    like = tensors[0] if base is None else base
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype, device=like.device)
    inputs = [tensor.contiguous() for tensor in tensors]
    with _on(like.device):
        kernel.launch(out, None if base is None else base.contiguous(), inputs, weights)
    return out


def task_gram(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_gram` with task vectors formed inside the tiles, lower triangle only."""
    from pymerge.kernels import task_gram as kernel

    columns = base.shape[1]
    out = torch.empty(columns, columns, dtype=torch.float32, device=base.device)
    used = [index for index, weight in enumerate(weights) if weight != 0.0]
    if not used:
        return out.zero_()
    with _on(base.device):
        kernel.launch(
            out,
            rows_contiguous(base),
            [rows_contiguous(experts[index]) for index in used],
            [weights[index] for index in used],
            None if means is None else means[used].to(torch.float32).contiguous(),
        )
    return out


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
    with _on(x.device):
        if problem.form == "factored":
            rows = None if biases is None else token_gates(biases, problem.runs).contiguous()
            kernel.launch_factored(out, x, weight, tasks, token_gates(gates, problem.runs), rows)
        else:
            runs = [list(run) for run in problem.runs]
            kernel.launch_mixed(out, x, weight, tasks, gates, None if biases is None else biases.contiguous(), runs)
    return out


_ROUTED = _RoutedKernels(TorchPasses())


def routed_linear(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    tasks: Tasks,
    bias: Tensor | None = None,
    bias_tasks: Tensor | None = None,
    index: Sequence[int] | None = None,
    form: Form = "auto",
) -> Tensor:
    """`routed_linear` with weights mixed inside the tiles of the product."""
    return run(_ROUTED, x, gates, weight, tasks, bias, bias_tasks, index, form)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
