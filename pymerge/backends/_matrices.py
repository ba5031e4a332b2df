"""Batches of matrices as the kernels of the device backends take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def as_batches(tensors: Sequence[ArrayLike]) -> list[Tensor]:
    """Batches of matrices as tensors, [L, d_out, d_in]; matrices become batches of one."""
    found = [as_tensor(tensor) for tensor in tensors]
    return [tensor if tensor.ndim == 3 else tensor.unsqueeze(0) for tensor in found]


def rows_contiguous(layers: Tensor) -> Tensor:
    """The batch of matrices itself if their rows are contiguous and do not overlap, else a copy."""
    if layers.stride(2) == 1 and layers.stride(1) >= layers.shape[2]:
        return layers
    return packed(layers)


def packed(layers: Tensor) -> Tensor:
    """A copy without gaps. Not contiguous(): it keeps meaningless strides of dimensions of size 0 or 1."""
    import torch

    return torch.empty(layers.shape, dtype=layers.dtype, device=layers.device).copy_(layers)


def weights_by_layer(weights: Sequence[float] | Tensor, layers: int, device: torch.device) -> Tensor:
    """[L, T] float32 on the device: the weights of each layer, or the same ones of all."""
    import torch

    if isinstance(weights, Sequence):
        weights = torch.tensor([list(weights)] * layers, dtype=torch.float64)
    return weights.to(device, torch.float32).contiguous()
