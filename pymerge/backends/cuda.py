"""CUDA C++ on NVIDIA devices (pymerge._cuda)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.batches import rows_contiguous, weights_by_layer
from pymerge.backends.cuda_sparse import trim_threshold
from pymerge.backends.dtypes import DTYPE_CODES, one_row
from pymerge.ops import spd_solve as spd
from pymerge.ops.wudi_adam import rates

NAME = "cuda"


def unavailable(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot compute on this device; None if they can."""
    try:
        importlib.import_module("pymerge._cuda")
    except ImportError as error:
        return f"pymerge._cuda does not load ({error}); install where nvcc is: PYMERGE_CUDA=1 pip install ."
    if device.type != "cuda":
        return f"it computes on NVIDIA devices and the tensors are on {device}; use --device cuda"
    return None


def implementations() -> Mapping[str, Callable[..., Any]]:
    """The ops with a CUDA kernel."""
    return {
        "combine": combine,
        "trim_threshold": trim_threshold,
        "task_gram": task_gram,
        "wudi_adam": wudi_adam,
        "spd_solve": spd_solve,
    }


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """A reason if the kernels do not know one of the dtypes."""
    unknown = sorted(str(dtype) for dtype in dtypes - set(DTYPE_CODES))
    if unknown:
        return f"{', '.join(unknown)} is not one of float32, float64, float16, bfloat16"
    if torch.float64 in dtypes and op in ("task_gram", "wudi_adam"):
        return "it computes in float32 on tensor cores, and float64 was given or asked for"
    if torch.float64 in dtypes and op == "trim_threshold":
        return "it compares float32 magnitudes, and float64 was given"
    return None


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divisor: float = 1.0,
) -> Tensor:
    """`combine` in one pass over the inputs, with the arithmetic of the C++ backend."""
    from pymerge import _cuda

    like = tensors[0] if base is None else base
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype, device=like.device) if out is None else out
    base = None if base is None else base.contiguous()
    inputs = [tensor.contiguous() for tensor in tensors]
    with torch.cuda.device(out.device):
        _cuda.combine(
            one_row(out),
            None if base is None else one_row(base),
            [one_row(tensor) for tensor in inputs],
            [float(weight) for weight in weights],
            divisor,
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    return out


def task_gram(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_gram` on tensor cores, task vectors formed on the way; lower triangle only, all layers in one launch."""
    from pymerge import _cuda

    if base.ndim == 2:
        first = None if means is None else means.unsqueeze(0)
        return task_gram(base.unsqueeze(0), [expert.unsqueeze(0) for expert in experts], weights, first, dtype)[0]
    layers, rows, columns = base.shape
    out = torch.empty(layers, columns, columns, dtype=torch.float32, device=base.device)
    base = rows_contiguous(base)
    inputs = [rows_contiguous(expert) for expert in experts]
    factors = weights_by_layer(weights, layers, base.device)
    shift = None if means is None else means.to(torch.float32).contiguous()
    with torch.cuda.device(out.device):
        _cuda.task_gram(
            out.data_ptr(),
            layers_argument(base),
            [layers_argument(expert) for expert in inputs],
            factors.data_ptr(),
            0 if shift is None else shift.data_ptr(),
            layers,
            rows,
            columns,
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    return out


def layers_argument(matrices: Tensor) -> tuple[int, int, int, int]:
    """(address, dtype code, row stride, layer stride), as csrc/bindings takes batches of matrices."""
    return matrices.data_ptr(), DTYPE_CODES[matrices.dtype], matrices.stride(1), matrices.stride(0)


def wudi_adam(
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """`wudi_adam` with one kernel a step for all layers, the product on tensor cores and the update at its end.

    Copying lr to the device waits for it. The steps do not: `_cuda.wudi_adam` can be captured in a graph.
    """
    from pymerge import _cuda

    if B.ndim == 2:
        return wudi_adam(A.unsqueeze(0), B.unsqueeze(0), iterations, lr, betas, eps)[0]
    A, B = A.contiguous(), B.contiguous()
    layers, rows, columns = B.shape
    D, m, v = (torch.zeros_like(B) for _ in range(3))
    other = torch.empty_like(B)
    speeds = torch.tensor(rates(lr, layers), dtype=torch.float64).to(B.device)
    with torch.cuda.device(B.device):
        _cuda.wudi_adam(
            D.data_ptr(),
            other.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            speeds.data_ptr(),
            layers,
            rows,
            columns,
            iterations,
            *betas,
            eps,
            torch.cuda.current_stream(B.device).cuda_stream,
        )
    return other if iterations % 2 else D


def spd_solve(S: Tensor, R: Tensor, prior: Tensor | None = None) -> spd.Solution:
    """`spd_solve` with a block for each small system; those that shared memory can't hold go to PyTorch's library."""
    from pymerge import _cuda

    rows, columns = R.shape[-2:]
    if not 0 < columns <= _cuda.spd_solve_columns(DTYPE_CODES[S.dtype]):
        return spd.reference(S, R, prior)
    layers = S.shape[:-2]
    S, R = S.contiguous(), R.contiguous()
    prior = None if prior is None else prior.contiguous()
    start = spd.start_vector(S)
    X = torch.empty_like(R)
    conditions = torch.empty(layers, dtype=S.dtype, device=S.device)
    minors = torch.empty(layers, dtype=torch.int32, device=S.device)
    with torch.cuda.device(S.device):
        _cuda.spd_solve(
            one_row(X),
            conditions.data_ptr(),
            minors.data_ptr(),
            one_row(S),
            one_row(R),
            None if prior is None else one_row(prior),
            one_row(start),
            minors.numel(),
            rows,
            columns,
            spd.ITERATIONS,
            torch.cuda.current_stream(S.device).cuda_stream,
        )
    return spd.Solution(X, spd.settle(S, conditions, minors))
