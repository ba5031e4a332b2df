"""Layers that mix their weight per sample: what all have in common, and the linear ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymerge.backends.runner import Runner
from pymerge.common.dtypes import code_of
from pymerge.ops import routed_linear
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.routed.task_storage import DenseTasks, LowRankTasks, SparseTasks, Tasks
from pymerge.wemoe.units import Unit


class RoutedLayer(nn.Module, ABC):
    """Takes the place of a layer whose weight is mixed for each sample from the base's and the task vectors.

    `weight` (d_out x ...) and `bias` are the base's, frozen; task vectors are buffers, of the weight as a matrix d_out
    x d_in. Everything that a caller may look at of the layer it replaces is there.
    """

    masked = True  # whether the tokens are those of the model's attention_mask

    def __init__(
        self, original: nn.Linear | nn.Conv2d, weight: Tensor, tasks: Tasks, bias_tasks: Tensor | None, unit: Unit
    ) -> None:
        super().__init__()
        self.unit = unit
        # What is left of the original, to make a plain layer again; in a tuple it is no submodule.
        skeleton = copy.copy(original)
        skeleton.__dict__["_parameters"] = {"weight": None, "bias": None}
        self._skeleton = (skeleton,)
        bias = original.bias
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._kind, self._count = type(tasks), tasks.count
        self._matrix = tasks.shape
        for name, tensor in tasks.tensors().items():
            self.register_buffer(f"tasks_{name}", tensor)
        self.bias_tasks: Tensor | None
        self.register_buffer("bias_tasks", bias_tasks)

    @property
    def tasks(self) -> Tasks:
        """The task vectors, from the buffers as they are now."""
        if self._kind is DenseTasks:
            return DenseTasks(self.get_buffer("tasks_values"))
        if self._kind is SparseTasks:
            values, columns, starts = (self.get_buffer(f"tasks_{name}") for name in ("values", "columns", "starts"))
            return SparseTasks(values, columns, starts, self._matrix)
        left, right, owners = (self.get_buffer(f"tasks_{name}") for name in ("left", "right", "owners"))
        return LowRankTasks(left, right, owners, self._count)

    @property
    def stored_tasks(self) -> Tasks:
        """The task vectors, oriented as the parameter that they were made of."""
        return self.tasks

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B x S x d) that the router sees of the layer's input, where it is the first of its unit."""

    def mixed_weights(self, gates: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights (K x d_out x d_in) mixed by gates (K x T), without a gradient."""
        run = runner(self.unit.shared.backend, self.weight.device)
        mixed: Tensor = run(MixWeights(self.weight.detach().flatten(1), self.tasks, gates.detach(), code_of(dtype)))
        return mixed

    def _mix(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out x d_in) and bias mixed by gates (T), without a gradient."""
        gates = gates.to(self.weight.device, torch.promote_types(torch.float32, self.weight.dtype))[None]
        bias = self._mixed_bias(gates, dtype)
        return self.mixed_weights(gates, dtype)[0], None if bias is None else bias[0]

    def _mixed_bias(self, gates: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Biases (K x d_out) mixed by gates (K x T), which may have a gradient."""
        if self.bias is None:
            return None
        bias = self.bias.detach().to(gates.dtype).expand(len(gates), -1)
        if self.bias_tasks is not None:
            bias = bias + gates @ self.bias_tasks.to(gates.dtype)
        return bias.to(dtype)

    def plain(self, gates: Tensor | None) -> nn.Module:
        """The original layer with its base weights, or with those mixed by gates (T)."""
        weight: Tensor = self.weight.detach().clone()
        bias: Tensor | None = None if self.bias is None else self.bias.detach().clone()
        if gates is not None:
            mixed, bias = self._mix(gates, weight.dtype)
            weight = mixed.view(weight.shape)
        layer = copy.deepcopy(self._skeleton[0])
        layer.weight = nn.Parameter(self._as_stored(weight), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight


class RoutedLinear(RoutedLayer):
    """Takes the place of an nn.Linear (or Conv1D): x (B x S x d_in) times a weight mixed for each sample."""

    def __init__(self, original: nn.Linear, tasks: Tasks, bias_tasks: Tensor | None, unit: Unit) -> None:
        self.transposed = is_transposed(original)
        weight: Tensor = original.weight.detach()
        if self.transposed:
            weight, tasks = weight.mT.contiguous(), tasks.transposed()
        super().__init__(original, weight, tasks, bias_tasks, unit)
        self.out_features, self.in_features = weight.shape[0], weight.shape[1]
        self._whole: tuple[Tensor, Tensor, Tensor | None] | None = None  # gates, and weight and bias mixed by them

    @property
    def stored_tasks(self) -> Tasks:
        return self.tasks.transposed() if self.transposed else self.tasks

    def tokens(self, x: Tensor) -> Tensor:
        """The input itself; samples x features are samples of one token each."""
        return x.reshape(len(x), -1, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.unit.gates_for(self, x)
        tokens = self.tokens(x)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        if self._is_worth_mixing(gates):
            weight, bias = self._mixed_for_prompt(gates, tokens.dtype)
            y = F.linear(tokens, weight, bias)
        else:
            self._whole = None
            run = runner(self.unit.shared.backend, x.device)
            y = run(routed_linear.RoutedLinear(tokens, gates, self.weight, self.tasks, self.bias, self.bias_tasks))
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def mixed_weight(self) -> Tensor | None:
        """The weight mixed for the prompt that is being decoded, if it is kept whole."""
        return None if self._whole is None else self._whole[1]

    def _is_worth_mixing(self, gates: Tensor) -> bool:
        """Whether one weight serves a prompt and every token decoded after it.

        Sparse and low-rank task vectors are there to save memory, and cheap to multiply a token with.
        """
        return self.unit.shared.call.cached and self._kind is DenseTasks and len(gates) == 1 and not gates.requires_grad

    def _mixed_for_prompt(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias mixed by the prompt's gates, made once and kept until other gates come."""
        key = self.unit.kept
        assert key is not None
        if self._whole is None or self._whole[0] is not key or self._whole[1].dtype != dtype:
            self._whole = None  # before the next one is made
            self._whole = (key, *self._mix(gates[0], dtype))
        return self._whole[1:]

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight.mT.contiguous() if self.transposed else weight


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for nn.Linear and its kin, and for transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for Conv1D, whose weight is d_in x d_out; its class is transformers', which need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@lru_cache(maxsize=16)
def runner(backend: str, device: torch.device) -> Runner:
    """The runner of a backend and device, made once."""
    return Runner(backend, device)
