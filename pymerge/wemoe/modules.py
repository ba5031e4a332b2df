"""Linear layers that mix their weight per sample, and the units (one MLP each) that compute gates for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymerge.backends.runner import Runner
from pymerge.common.dtypes import code_of
from pymerge.env import default_backend
from pymerge.errors import ArgumentError
from pymerge.ops import routed_linear
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.routed.task_storage import DenseTasks, LowRankTasks, SparseTasks, Tasks
from pymerge.wemoe.router import Router, layer_code


@dataclass
class Call:
    """State of the running forward of a model, for its units.

    The padding mask (B x S), whether it decodes, and whether it has a key-value cache, so that decoding may follow.
    """

    mask: Tensor | None = None
    decoding: bool = False
    cached: bool = False


@dataclass
class Shared:
    """State that all units of a model share."""

    reduce: str = "sample"
    backend: str = field(default_factory=default_backend)
    calls: list[Call] = field(default_factory=list)

    @property
    def call(self) -> Call:
        """The innermost running forward."""
        return self.calls[-1] if self.calls else Call()


class Unit:
    """One upscaled MLP: computes gates from its input and hands them to its linear layers.

    The input is what its first linear layer is called with. The MLP's own code decides the order: gates are computed
    anew when a layer is called that has used the present ones.
    """

    def __init__(self, path: str, hidden_size: int, router: Router, index: int, shared: Shared) -> None:
        self.path, self.hidden_size, self.router, self.index, self.shared = path, hidden_size, router, index, shared
        self.kept: Tensor | None = None  # of the latest input that was not a decoding step, without its graph
        self._current: Tensor | None = None
        self._used_by: set[int] = set()

    def gates_for(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """Gates (B x T, or 1 x T if reduced over the batch) for a layer called with tokens (B x S x d)."""
        call = self.shared.call
        if call.decoding and self.kept is not None:
            return self._of_prompt(len(tokens), self.kept)
        if self._current is None or id(layer) in self._used_by:
            self._current = self._compute(tokens, call.mask)
            self._used_by.clear()
            self.kept = self._current.detach()
        self._used_by.add(id(layer))
        return self._current

    def reset(self) -> None:
        """Forget the gates of a forward that is over, and with them its graph."""
        self._current = None
        self._used_by.clear()

    def _compute(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if tokens.shape[-1] != self.hidden_size:
            raise ArgumentError(
                f"{self.path}: its first linear layer got {tokens.shape[-1]} features, the router takes "
                f"{self.hidden_size}; list the parameters of one whole MLP"
            )
        if mask is not None:
            # With a prefix in the cache the mask is longer than the input.
            mask = mask[:, -tokens.shape[1] :]
            if mask.shape != tokens.shape[:2]:
                raise ArgumentError(
                    f"{self.path}: attention_mask is {tuple(mask.shape)} for an input of {tuple(tokens.shape[:2])} "
                    "samples and tokens; give one entry for each token"
                )
        code = layer_code(self.index).to(tokens.device) if self.router.code_size else None
        with torch.autocast(tokens.device.type, enabled=False):
            gates: Tensor = self.router(tokens, mask, code)
        return gates.mean(0, keepdim=True) if self.shared.reduce == "batch" else gates

    def _of_prompt(self, samples: int, kept: Tensor) -> Tensor:
        """Gates of the prompts for decoding steps; several sequences of one prompt lie side by side."""
        if len(kept) in (1, samples):
            return kept
        if samples % len(kept):
            raise ArgumentError(
                f"{self.path}: {samples} sequences are decoded after a prefill of {len(kept)}; run the prefill again"
            )
        return kept.repeat_interleave(samples // len(kept), 0)


class RoutedLinear(nn.Module):
    """Takes the place of an nn.Linear (or Conv1D): x (B x S x d_in) times a weight mixed for each sample.

    `weight` (d_out x d_in) and `bias` are the base's, frozen; task vectors are buffers. Everything that a caller may
    look at of a linear layer (weight, bias, in_features, out_features) is there.
    """

    def __init__(self, original: nn.Linear, tasks: Tasks, bias_tasks: Tensor | None, unit: Unit) -> None:
        super().__init__()
        self.transposed = is_transposed(original)
        self.unit = unit
        # What is left of the original, to make a plain layer again; in a tuple it is no submodule.
        skeleton = copy.copy(original)
        skeleton.__dict__["_parameters"] = {"weight": None, "bias": None}
        self._skeleton = (skeleton,)
        weight: Tensor = original.weight.detach()
        bias = original.bias
        if self.transposed:
            weight, tasks = weight.mT.contiguous(), tasks.transposed()
        self.out_features, self.in_features = weight.shape[0], weight.shape[1]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._kind, self._count = type(tasks), tasks.count
        for name, tensor in tasks.tensors().items():
            self.register_buffer(f"tasks_{name}", tensor)
        self.bias_tasks: Tensor | None
        self.register_buffer("bias_tasks", bias_tasks)
        self._whole: tuple[Tensor, Tensor, Tensor | None] | None = None  # gates, and weight and bias mixed by them

    @property
    def tasks(self) -> Tasks:
        """The task vectors, from the buffers as they are now."""
        if self._kind is DenseTasks:
            return DenseTasks(self.get_buffer("tasks_values"))
        if self._kind is SparseTasks:
            values, columns, starts = (self.get_buffer(f"tasks_{name}") for name in ("values", "columns", "starts"))
            return SparseTasks(values, columns, starts, (self.out_features, self.in_features))
        left, right, owners = (self.get_buffer(f"tasks_{name}") for name in ("left", "right", "owners"))
        return LowRankTasks(left, right, owners, self._count)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), -1, x.shape[-1])
        gates = self.unit.gates_for(self, tokens)
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

    def _mix(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias mixed by gates (T)."""
        gates = gates.to(self.weight.device, torch.promote_types(torch.float32, self.weight.dtype))
        run = runner(self.unit.shared.backend, self.weight.device)
        weight: Tensor = run(MixWeights(self.weight.detach(), self.tasks, gates[None], code_of(dtype)))[0]
        bias = None if self.bias is None else self.bias.detach().to(gates.dtype)
        if bias is not None and self.bias_tasks is not None:
            bias = bias + gates @ self.bias_tasks.to(gates.dtype)
        return weight, None if bias is None else bias.to(dtype)

    def plain(self, gates: Tensor | None) -> nn.Module:
        """The original layer with its base weights, or with those mixed by gates (T)."""
        weight: Tensor = self.weight.detach().clone()
        bias: Tensor | None = None if self.bias is None else self.bias.detach().clone()
        if gates is not None:
            weight, bias = self._mix(gates, weight.dtype)
        layer = copy.deepcopy(self._skeleton[0])
        layer.weight = nn.Parameter(weight.mT.contiguous() if self.transposed else weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer


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


def call_hooks(
    module: nn.Module,
    shared: Shared,
    parse: Callable[[tuple[Any, ...], dict[str, Any]], Call],
    finished: Callable[[], None],
) -> list[Any]:
    """Hooks that push a Call while `module` runs; `finished` is called when the outermost one is over."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared.calls.append(parse(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shared.calls.pop()
        if not shared.calls:
            finished()

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
