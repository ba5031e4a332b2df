"""C++ on the CPU (pymerge._C), with PyTorch's GEMMs between its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.combine_files import missing
from pymerge.backends.dtypes import DTYPE_CODES as DTYPE_CODES
from pymerge.backends.dtypes import one_row
from pymerge.backends.native_elementwise import (
    arcee_fusion,
    importance,
    nearswap,
    ram,
    ram_counts,
    row_divergence,
    sce,
    sce_energies,
    sce_spread,
)
from pymerge.backends.native_routed import routed_linear
from pymerge.backends.native_sparse import magnitude_counts, magnitude_mask, random_mask, sparse_combine, trim_threshold
from pymerge.common.shapes import Axis, vector_shape
from pymerge.ops._op import compute_dtype
from pymerge.ops.gradient_flow import evaluate
from pymerge.ops.normal_equations import NormalEquations, outputs_first
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.wudi_adam import bias_corrections

NAME = "native"

# Ops whose C++ knows float32 results only.
_FLOAT32_OPS = ("task_stats", "routed_linear", "trim_threshold", "magnitude_counts", "magnitude_mask", "random_mask")

# From this many columns on, a symmetric product is computed in panels of its lower triangle, faster than a full
# one. The width is no power of two: panels of 256 float64 columns would fall on the same cache lines.
_HALF_FROM = 512
_PANEL = 192


def unavailable(device: torch.device) -> str | None:
    """Why C++ cannot compute on this device; None if it can."""
    if device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {device}; use --device cpu or --backend reference"
    return missing()


def implementations() -> Mapping[str, Callable[..., Any]]:
    """The ops with C++ in them."""
    return {
        "combine": combine,
        "trim_threshold": trim_threshold,
        "magnitude_counts": magnitude_counts,
        "magnitude_mask": magnitude_mask,
        "random_mask": random_mask,
        "sparse_combine": sparse_combine,
        "nearswap": nearswap,
        "ram_counts": ram_counts,
        "ram": ram,
        "sce_spread": sce_spread,
        "sce_energies": sce_energies,
        "sce": sce,
        "row_divergence": row_divergence,
        "importance": importance,
        "arcee_fusion": arcee_fusion,
        "task_dots": task_dots,
        "task_stats": task_stats,
        "task_sum": task_sum,
        "task_gram": task_gram,
        "normal_equations": normal_equations,
        "wudi_adam": wudi_adam,
        "gradient_flow": gradient_flow,
        "routed_linear": routed_linear,
    }


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """A reason if the C++ code does not know one of the dtypes."""
    unknown = sorted(str(dtype) for dtype in dtypes - set(DTYPE_CODES))
    if unknown:
        return f"{', '.join(unknown)} is not one of float32, float64, float16, bfloat16"
    if torch.float64 in dtypes and op in _FLOAT32_OPS:
        return "its sums are float32, and float64 was given"
    return None


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divisor: float = 1.0,
) -> Tensor:
    """`combine` in one pass over the inputs; bit for bit the reference's result."""
    from pymerge import _C

    like = tensors[0] if base is None else base
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype) if out is None else out
    base = None if base is None else base.contiguous()
    inputs = [tensor.contiguous() for tensor in tensors]
    _C.combine(
        one_row(out),
        None if base is None else one_row(base),
        [one_row(tensor) for tensor in inputs],
        [float(weight) for weight in weights],
        divisor,
        torch.get_num_threads(),
    )
    return out


def task_dots(base: Tensor | None, tensors: Sequence[Tensor], axis: Axis = "whole") -> Tensor:
    """`task_dots` in one pass over the inputs; columns are turned into rows first."""
    from pymerge import _C

    rows, columns = vector_shape(tensors[0].shape, axis)
    vectors, length = (columns, rows) if axis == "columns" else (rows, columns)
    dots = torch.empty(vectors, len(tensors), len(tensors), dtype=torch.float64)
    if axis == "columns":
        tensors = [tensor.reshape(rows, columns).T for tensor in tensors]
        base = None if base is None else base.reshape(rows, columns).T
    inputs = [tensor.contiguous() for tensor in tensors]
    base = None if base is None else base.contiguous()
    _C.task_dots(
        dots.data_ptr(),
        None if base is None else one_row(base),
        [one_row(tensor) for tensor in inputs],
        vectors,
        length,
        torch.get_num_threads(),
    )
    return dots


def task_stats(base: Tensor, experts: Sequence[Tensor]) -> TaskStats:
    """`task_stats` in one pass over each expert, sums in float64."""
    from pymerge import _C

    rows, columns = base.shape
    norms = torch.empty(len(experts), dtype=torch.float64)
    traces = torch.empty_like(norms)
    means = torch.empty(len(experts), columns)
    base = rows_contiguous(base)
    inputs = [rows_contiguous(expert) for expert in experts]
    _C.task_stats(
        norms.data_ptr(),
        traces.data_ptr(),
        means.data_ptr(),
        matrix_argument(base),
        [matrix_argument(expert) for expert in inputs],
        rows,
        columns,
        torch.get_num_threads(),
    )
    return TaskStats(norms, traces, means)


def task_sum(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_sum` in one pass over the inputs."""
    total = torch.empty(base.shape, dtype=dtype or compute_dtype(base, *experts))
    _write_task_sum(total, base, experts, weights, means)
    return total


def task_gram(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_gram` with one task vector in memory at a time, and half the products where that is faster."""
    columns = base.shape[1]
    dtype = dtype or compute_dtype(base, *experts)
    gram = torch.zeros(columns, columns, dtype=dtype)
    tau = torch.empty(base.shape, dtype=dtype)
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        if weight != 0.0:
            _write_task_sum(tau, base, [expert], [1.0], None if means is None else means[index : index + 1])
            _add_gram(gram, tau, weight)
    return _mirror(gram)


def normal_equations(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    means: Tensor | None = None,
    origin: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ridges: Sequence[float] | None = None,
) -> NormalEquations:
    """`normal_equations` with two d_out x d_in buffers and one d_in x d_in buffer for all tasks."""
    rows, columns = base.shape
    dtype = dtype or compute_dtype(base, *experts)
    A = torch.zeros(columns, columns, dtype=dtype)
    B = torch.zeros(rows, columns, dtype=dtype)
    tau = torch.empty(rows, columns, dtype=dtype)
    left = tau if origin is None else torch.empty_like(tau)
    gram = None if outputs_first(rows, columns) else torch.empty_like(A)
    ridges = [0.0] * len(experts) if ridges is None else ridges
    for index, (expert, weight, ridge) in enumerate(zip(experts, weights, ridges, strict=True)):
        if weight == 0.0 and ridge == 0.0:
            continue
        _write_task_sum(tau, base, [expert], [1.0], None if means is None else means[index : index + 1])
        if origin is not None:
            torch.sub(tau, origin, out=left)
        if gram is None:
            _add_gram(A, tau, weight)
            B.addmm_(left @ tau.mT, tau, alpha=weight)
        else:
            _add_gram(gram.zero_(), tau, 1.0)
            A.add_(_mirror(gram), alpha=weight)
            B.addmm_(left, gram, alpha=weight)
        if ridge != 0.0:
            B.add_(left, alpha=ridge)
    if gram is None:
        _mirror(A)
    A.diagonal().add_(sum(ridges))
    return NormalEquations(A, B)


def wudi_adam(
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """`wudi_adam` with one GEMM and one fused pass a step."""
    from pymerge import _C

    A, B = A.contiguous(), B.contiguous()
    D, m, v = torch.zeros_like(B), torch.zeros_like(B), torch.zeros_like(B)
    product = torch.empty_like(B)
    for step in range(1, iterations + 1):
        torch.mm(D, A, out=product)
        state = one_row(D), one_row(m), one_row(v)
        numbers = (*betas, *bias_corrections(step, betas), lr, eps)
        _C.wudi_adam_step(*state, one_row(product), one_row(B), *numbers, torch.get_num_threads())
    return D


def gradient_flow(A: Tensor, B: Tensor, time: float) -> Tensor:
    """`gradient_flow` with half of each product of symmetric matrices, where that is faster."""
    return evaluate(A, B, time, _symmetric_product)


def rows_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous and do not overlap, else a copy."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    # Not contiguous(): it keeps meaningless strides of dimensions of size 0 or 1.
    return torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def matrix_argument(matrix: Tensor) -> tuple[int, int, int]:
    """(address, dtype code, row stride), as csrc/bindings takes matrices."""
    return matrix.data_ptr(), DTYPE_CODES[matrix.dtype], matrix.stride(0)


def _write_task_sum(
    out: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], means: Tensor | None
) -> None:
    """Write sum_t w_t tau~_t to `out`, contiguous, in its dtype."""
    from pymerge import _C

    rows, columns = out.shape
    base = rows_contiguous(base)
    inputs = [rows_contiguous(expert) for expert in experts]
    means = None if means is None else means.to(out.dtype).contiguous()
    _C.task_sum(
        (out.data_ptr(), DTYPE_CODES[out.dtype], columns),
        matrix_argument(base),
        [matrix_argument(expert) for expert in inputs],
        [float(weight) for weight in weights],
        0 if means is None else means.data_ptr(),
        rows,
        columns,
        torch.get_num_threads(),
    )


def _panels(columns: int) -> list[tuple[int, int]]:
    """Column ranges of the lower-triangle products; one range (a full product) where halving does not pay."""
    size = max(columns, 1) if columns < _HALF_FROM else _PANEL
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def _add_gram(gram: Tensor, tau: Tensor, weight: float) -> None:
    """Add w tau^T tau to the lower triangle of `gram` (and to some of the rest; `_mirror` sets it)."""
    for start, stop in _panels(tau.shape[1]):
        gram[start:, start:stop].addmm_(tau[:, start:].mT, tau[:, start:stop], alpha=weight)


def _mirror(gram: Tensor) -> Tensor:
    """Copy the lower triangle's panels above the diagonal, in place."""
    for start, stop in _panels(gram.shape[0]):
        gram[start:stop, stop:] = gram[stop:, start:stop].mT
    return gram


def _symmetric_product(left: Tensor, right: Tensor, *, alpha: float = 1.0, less: Tensor | None = None) -> Tensor:
    """The lower triangle's panels of alpha left right - less, mirrored."""
    product = torch.empty_like(left) if less is None else less
    for start, stop in _panels(left.shape[0]):
        panel = product[start:, start:stop]
        panel.addmm_(left[start:], right[:, start:stop], beta=0.0 if less is None else -1.0, alpha=alpha)
    return _mirror(product)
