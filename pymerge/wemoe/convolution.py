"""Convolutions that mix their weight per sample."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymerge.errors import ArgumentError
from pymerge.ops.routed.task_storage import Tasks
from pymerge.wemoe.modules import RoutedLayer
from pymerge.wemoe.units import Unit

_LOOKED_AT = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode", "output_padding"),
)
_FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class RoutedConvolution(RoutedLayer):
    """Takes the place of an nn.Conv1d, 2d or 3d: x (B x C x ...) under a kernel mixed for each sample.

    The weights of all samples are mixed, and applied in one convolution with a group for each sample. Task vectors are
    those of the weight as a matrix d_out x (C/groups * kernel).
    """

    masked = False

    def __init__(self, original: nn.Conv2d, tasks: Tasks, bias_tasks: Tensor | None, unit: Unit) -> None:
        super().__init__(original, original.weight, tasks, bias_tasks, unit)
        for name in _LOOKED_AT:
            setattr(self, name, getattr(original, name))

    def tokens(self, x: Tensor) -> Tensor:
        """The base's own response to the input, a token each position: pixels by themselves tell a router little."""
        return self._convolve(x, self.weight, self.bias).flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.weight.ndim:
            raise ArgumentError(
                f"{self.unit.path}: a convolution got an input of shape {tuple(x.shape)}; give a batch of samples, "
                f"{self.weight.ndim} axes"
            )
        gates = self.unit.gates_for(self, x)
        gates = gates.to(torch.promote_types(torch.float32, self.weight.dtype))
        mixed: Any = _Mixed
        weight, bias = mixed.apply(gates, self), self._mixed_bias(gates, self.weight.dtype)
        if len(gates) == 1:
            return self._convolve(x, weight[0].view_as(self.weight), None if bias is None else bias[0])
        weight = weight.view(-1, *self.weight.shape[1:])
        return self._convolve(x, weight, None if bias is None else bias.flatten(), len(gates))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, samples: int = 1) -> Tensor:
        """The convolution of x by one weight, or by `samples` of them, one after the other, a sample each."""
        own: Any = self._skeleton[0]
        batch, padding = len(x), own.padding
        if own.padding_mode != "zeros":
            x, padding = F.pad(x, own._reversed_padding_repeated_twice, mode=own.padding_mode), 0
        if samples > 1:
            x = x.reshape(1, -1, *x.shape[2:])
        function = _FUNCTIONS[_kind(own)]
        y: Tensor = function(x, weight, bias, own.stride, padding, own.dilation, own.groups * samples)
        return y.view(batch, -1, *y.shape[2:])


class _Mixed(torch.autograd.Function):
    """Weights (K x d_out x d_in) mixed by gates (K x T); their gradient is dL/dg_kt = <dW_k, tau_t>."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, layer: RoutedConvolution) -> Tensor:
        ctx.tasks = layer.tasks
        return layer.mixed_weights(gates, layer.weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(torch.float32, grads[0].dtype)
        return torch.stack([ctx.tasks.dots(one.to(wide), slice(None)) for one in grads[0]]), None


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True for nn.Conv1d, 2d, 3d, and for kinds of them that convolve as these do."""
    return _kind(module) is not None


def _kind(module: nn.Module) -> Any:
    """The class of PyTorch whose code a convolution runs; None for one with code of its own, which may not use its
    weight as it is."""
    own: Any = type(module)
    kind: Any
    for kind in _FUNCTIONS:
        if isinstance(module, kind) and (own.forward, own._conv_forward) == (kind.forward, kind._conv_forward):
            return kind
    return None
