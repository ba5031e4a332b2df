"""Triton kernels on NVIDIA devices (pymerge.kernels), or on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge.backends._matrices import packed, rows_contiguous, weights_by_layer
from pymerge.backends.triton._elementwise import combine_vectors, nearswap, ram, ram_counts, task_dots
from pymerge.backends.triton._routed import on, routed_linear
from pymerge.backends.triton._sparse import magnitude_mask, random_mask, sparse_combine
from pymerge.ops import spd_solve as spd
from pymerge.ops.wudi_adam import bias_corrections, rates

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
    return {
        "combine": combine,
        "magnitude_mask": magnitude_mask,
        "random_mask": random_mask,
        "sparse_combine": sparse_combine,
        "task_dots": task_dots,
        "combine_vectors": combine_vectors,
        "nearswap": nearswap,
        "ram_counts": ram_counts,
        "ram": ram,
        "task_gram": task_gram,
        "wudi_adam": wudi_adam,
        "spd_solve": spd_solve,
        "routed_linear": routed_linear,
    }


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """A reason if the kernels do not know one of the dtypes."""
    if op == "spd_solve":
        return None  # its check leaves float32 and float64, and the kernel takes both
    unknown = sorted(str(dtype) for dtype in dtypes - _DTYPES)
    return f"{', '.join(unknown)} is not one of float32, float16, bfloat16" if unknown else None


def combine(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divisor: float = 1.0,
) -> Tensor:
    """`combine` in one pass over the inputs."""
    from pymerge.kernels import combine as kernel

    like = tensors[0] if base is None else base
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype, device=like.device) if out is None else out
    inputs = [tensor.contiguous() for tensor in tensors]
    with on(like.device):
        kernel.launch(out, None if base is None else base.contiguous(), inputs, weights, divisor)
    return out


def task_gram(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    means: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`task_gram` with task vectors formed inside the tiles, lower triangle only, all layers in one launch.

    The experts share one dtype and one layout in the kernel; where they don't, they are copied to one.
    """
    from pymerge.kernels import task_gram as kernel

    if base.ndim == 2:
        first = None if means is None else means.unsqueeze(0)
        return task_gram(base.unsqueeze(0), [expert.unsqueeze(0) for expert in experts], weights, first, dtype)[0]
    layers, _, columns = base.shape
    common = experts[0].dtype if len({expert.dtype for expert in experts}) == 1 else torch.float32
    experts = [rows_contiguous(expert.to(common)) for expert in experts]
    if len({expert.stride() for expert in experts}) > 1:
        experts = [packed(expert) for expert in experts]
    out = torch.empty(layers, columns, columns, dtype=torch.float32, device=base.device)
    with on(base.device):
        kernel.launch(
            out,
            rows_contiguous(base),
            experts,
            weights_by_layer(weights, layers, out.device),
            None if means is None else means.to(torch.float32).contiguous(),
            _interpreted(),
        )
    return out


def wudi_adam(
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """`wudi_adam` with one kernel a step, the product and the update; on a device, steps replayed as a graph."""
    from pymerge.kernels import wudi_adam as kernel

    if B.ndim == 2:
        return wudi_adam(A.unsqueeze(0), B.unsqueeze(0), iterations, lr, betas, eps)[0]
    corrections = (bias_corrections(step, betas) for step in range(1, iterations + 1))
    speeds = rates(lr, len(B))
    factors = [[(second, -rate / first) for rate in speeds] for first, second in corrections]
    schedule = torch.tensor(factors, dtype=torch.float32).to(B.device)
    with on(B.device):
        D: Tensor = kernel.launch(A.contiguous(), B.contiguous(), schedule, betas, eps)
    return D


def spd_solve(S: Tensor, R: Tensor, prior: Tensor | None = None) -> spd.Solution:
    """`spd_solve` of small systems, all in one launch; those that registers can't hold go to PyTorch's library."""
    from pymerge.kernels import spd_solve as kernel

    if not 0 < R.shape[-1] <= kernel.MOST_COLUMNS:
        return spd.reference(S, R, prior)
    S, R = S.contiguous(), R.contiguous()
    X = torch.empty_like(R)
    conditions = torch.empty(S.shape[:-2], dtype=torch.float64, device=S.device)
    minors = torch.empty(S.shape[:-2], dtype=torch.int32, device=S.device)
    shift = None if prior is None else prior.contiguous()
    with on(S.device):
        kernel.launch(X, conditions, minors, S, R, shift, spd.start_vector(S), spd.ITERATIONS)
    return spd.Solution(X, spd.settle(S, conditions, minors))
