"""CUDA C++ on NVIDIA devices (pymerge._cuda)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.native import DTYPE_CODES, matrix_argument, rows_contiguous
from pymerge.ops import spd_solve as spd

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
    return {"combine": combine, "task_gram": task_gram, "spd_solve": spd_solve}


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """A reason if the kernels do not know one of the dtypes."""
    unknown = sorted(str(dtype) for dtype in dtypes - set(DTYPE_CODES))
    if unknown:
        return f"{', '.join(unknown)} is not one of float32, float64, float16, bfloat16"
    if torch.float64 in dtypes and op == "task_gram":
        return "it forms task vectors in float32, and float64 was given or asked for"
    return None


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`combine` in one pass over the inputs, with the arithmetic of the C++ backend."""
    from pymerge import _cuda

    like = tensors[0] if base is None else base
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype, device=like.device) if out is None else out
    base = None if base is None else base.contiguous()
    inputs = [tensor.contiguous() for tensor in tensors]
    with torch.cuda.device(out.device):
        _cuda.combine(
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            0 if base is None else base.data_ptr(),
            DTYPE_CODES[torch.float32 if base is None else base.dtype],
            [tensor.data_ptr() for tensor in inputs],
            [DTYPE_CODES[tensor.dtype] for tensor in inputs],
            [float(weight) for weight in weights],
            out.numel(),
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    return out


def task_gram(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_gram` with task vectors formed inside the tiles, lower triangle only."""
    from pymerge import _cuda

    rows, columns = base.shape
    out = torch.empty(columns, columns, dtype=torch.float32, device=base.device)
    used = [index for index, weight in enumerate(weights) if weight != 0.0]
    base = rows_contiguous(base)
    inputs = [rows_contiguous(experts[index]) for index in used]
    shift = None if means is None else means[used].to(torch.float32).contiguous()
    with torch.cuda.device(out.device):
        _cuda.task_gram(
            out.data_ptr(),
            matrix_argument(base),
            [matrix_argument(matrix) for matrix in inputs],
            [float(weights[index]) for index in used],
            0 if shift is None else shift.data_ptr(),
            rows,
            columns,
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    return out


def spd_solve(S: Tensor, R: Tensor, prior: Tensor | None = None) -> spd.Solution:
    """`spd_solve` with a block for each small system; those that shared memory can't hold go to PyTorch's library."""
    from pymerge import _cuda

    code = DTYPE_CODES[S.dtype]
    rows, columns = R.shape[-2:]
    if not 0 < columns <= _cuda.spd_solve_columns(code):
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
            X.data_ptr(),
            conditions.data_ptr(),
            minors.data_ptr(),
            S.data_ptr(),
            R.data_ptr(),
            0 if prior is None else prior.data_ptr(),
            start.data_ptr(),
            code,
            minors.numel(),
            rows,
            columns,
            spd.ITERATIONS,
            torch.cuda.current_stream(S.device).cuda_stream,
        )
    return spd.Solution(X, spd.settle(S, conditions, minors))
