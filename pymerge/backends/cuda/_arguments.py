"""Arguments of kernels of csrc beside the forms that the CPU's bindings take, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def stream_of(tensor: Tensor) -> int:
    """The stream that PyTorch computes on, on a tensor's device."""
    import torch

    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
