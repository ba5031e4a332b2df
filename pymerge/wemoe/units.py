"""Units, one for each upscaled module, which compute gates for its layers; and what they know of a running forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pymerge.env import default_backend
from pymerge.errors import ArgumentError
from pymerge.wemoe.router import Router, layer_code


class Layer(Protocol):
    """Layer, as far as its unit asks."""

    masked: bool  # whether tokens are those of the model's attention_mask

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B x S x d) that the router sees of the layer's input, where it is the first of its unit."""


@dataclass
class Call:
    """State of the running forward of a model, for its units.

    The padding mask (B x S), whether it decodes, and whether it has a key-value cache, so that decoding may follow.
    """

    mask: Tensor | None = None
    decoding: bool = False
    cached: bool = False


@dataclass
class Given:
    """Gates (1 x T) that layers mix by, whatever routers say, and what routers say (B x T each).

    The graphs of the latter end at the routers' inputs.
    """

    gates: Tensor
    said: list[Tensor] = field(default_factory=list)


@dataclass
class Shared:
    """State that all units of a model share."""

    reduce: str = "sample"
    backend: str = field(default_factory=default_backend)
    calls: list[Call] = field(default_factory=list)
    given: Given | None = None

    @property
    def call(self) -> Call:
        """The innermost running forward."""
        return self.calls[-1] if self.calls else Call()


class Unit:
    """One upscaled module: computes gates from its input and hands them to its layers.

    The input is what its first layer sees: see `Layer.tokens`. The module's own code decides the order: gates are
    computed anew when a layer is called that has used the present ones.
    """

    def __init__(self, path: str, hidden_size: int, router: Router, index: int, shared: Shared) -> None:
        self.path, self.hidden_size, self.router, self.index, self.shared = path, hidden_size, router, index, shared
        self.kept: Tensor | None = None  # of the latest input that was not a decoding step, without its graph
        self._current: Tensor | None = None
        self._used_by: set[int] = set()

    def gates_for(self, layer: Layer, x: Tensor) -> Tensor:
        """Gates (B x T, or 1 x T if reduced over the batch) for a layer called with x (B samples)."""
        call = self.shared.call
        if call.decoding and self.kept is not None:
            return self._of_prompt(len(x), self.kept)
        if self._current is None or id(layer) in self._used_by:
            self._current = self._compute(layer.tokens(x), call.mask if layer.masked else None)
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
                f"{self.path}: its first layer has {tokens.shape[-1]} features for the router, which takes "
                f"{self.hidden_size}; list the parameters of one whole module"
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
        given = self.shared.given
        wanted = torch.is_grad_enabled() or given is not None
        with torch.autocast(tokens.device.type, enabled=False), torch.set_grad_enabled(wanted):
            gates: Tensor = self.router(tokens, mask, code)
        if given is not None:
            given.said.append(gates)
            return given.gates
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
