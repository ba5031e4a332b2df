"""Tensors for Triton's kernels, and the device that they are launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.dtypes import code_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: Triton launches there."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def output(out: ArrayLike | None, like: ArrayLike, out_dtype: str | None) -> Tensor:
    """Memory for a result: `out`, or a new tensor of the shape of `like`, in `out_dtype` or its dtype."""
    import torch

    if out is not None:
        return as_tensor(out)
    tensor = as_tensor(like)
    dtype = tensor.dtype if out_dtype is None else torch_dtype(code_of(out_dtype))
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
