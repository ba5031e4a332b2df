"""Moves each element of one model towards another's, by a limited distance."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp
from pymerge.ops._op import check_task_tensors, compute_dtype

# Differences count as this at least.
LEAST_DIFFERENCE = 1e-6


def check(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> None:
    """Raise ArgumentError unless shapes and devices agree, dtypes are floating point and t is not negative."""
    check_task_tensors("nearswap", base, [expert])
    if not t >= 0.0:
        raise ArgumentError(f"nearswap: t is {t!r}; it must be at least 0")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"nearswap: out_dtype {out_dtype} is not floating point; choose one that is")


def reference(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return q W_1 + (1 - q) W_0 with q = min(t / max(|W_1 - W_0|, 1e-6), 1), element by element.

    Args:
        base: W_0, any shape, floating point.
        expert: W_1 like it.
        t: the farthest that an element moves.
        out_dtype: dtype of the result; default: the base's.

    In float32 (float64 if an input is), rounded once at the end. Source: QuartetAnemoi-70B-t0.0001 (Hugging Face),
    mergekit.
    """
    dtype = compute_dtype(base, expert)
    near, far = base.to(dtype), expert.to(dtype)
    share = (t / (far - near).abs_().clamp_(min=LEAST_DIFFERENCE)).clamp_(max=1.0)
    return (share * far).add_((1.0 - share).mul_(near)).to(out_dtype or base.dtype)


OP = FunctionOp("nearswap", check, reference, "each element moved towards another model's by a limited distance")
