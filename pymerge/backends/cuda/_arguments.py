"""Tensors on a device as csrc/bindings takes them, beside the forms that the CPU's bindings take, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.common.arrays import dtype_of
from pymerge.common.dtypes import NATIVE

if TYPE_CHECKING:
    from torch import Tensor


def layers_argument(matrices: Tensor) -> tuple[int, int, int, int]:
    """A batch of matrices whose rows are contiguous: (address, dtype, row stride, layer stride)."""
    return matrices.data_ptr(), NATIVE[dtype_of(matrices)], matrices.stride(1), matrices.stride(0)


def stream_of(tensor: Tensor) -> int:
    """The stream that PyTorch computes on, on a tensor's device."""
    import torch

    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
