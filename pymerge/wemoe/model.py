"""RoutedModel: a model whose modules mix base and experts for each input; all else is the architecture's own code."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymerge.errors import ArgumentError
from pymerge.ops.routed.task_storage import Tasks
from pymerge.wemoe.convolution import RoutedConvolution, is_convolution
from pymerge.wemoe.modules import RoutedLayer, RoutedLinear, is_linear
from pymerge.wemoe.router_file import read_routers, write_routers
from pymerge.wemoe.spec import Spec
from pymerge.wemoe.units import Call, Given, Shared, Unit, call_hooks


class RoutedModel(nn.Module):
    """Wraps a model: `forward` and every other attribute (generate, config, ...) are the model's own.

    Only router parameters require gradients. `reduce` is "sample" (each sample has its own gates) or "batch" (the mean
    of the samples' gates serves all).
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        names: Mapping[str, str],
        task_vectors: Mapping[str, Tasks | Tensor],
        routers: nn.ModuleList,
    ) -> None:
        """Replace, in `model` itself, the layers of `spec`.

        Args:
            model: the architecture with the static merge, and the base's weights in what is mixed.
            spec: modules, experts, routers; parameters by checkpoint names.
            names: the model's own name for each of these.
            task_vectors: for each checkpoint name Tasks (weights) or T x n (biases), oriented as the parameter is.
            routers: one for each module, or one.
        """
        super().__init__()
        self.spec = spec
        self.routers = routers
        self._shared = Shared(spec.reduce)
        self._hooks: list[Any] = []
        self.units: list[Unit] = []
        for index, module in enumerate(spec.modules):
            router: Any = routers[0 if spec.router.shared else index]
            unit = Unit(module.path, module.hidden_size, router, index, self._shared)
            self.units.append(unit)
            for name in module.parameters:
                if name.endswith(".weight"):
                    tasks, bias = task_vectors[name], task_vectors.get(f"{name.removesuffix('.weight')}.bias")
                    assert not isinstance(tasks, Tensor)
                    assert bias is None or isinstance(bias, Tensor)
                    path = names[name].removesuffix(".weight")
                    routed = _routed(path, model.get_submodule(path), tasks, bias, unit)
                    parent, _, child = path.rpartition(".")
                    setattr(model.get_submodule(parent), child, routed)
        model.requires_grad_(False)
        self.model = model
        self._install_hooks()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def reduce(self) -> Literal["sample", "batch"]:
        """Whether each sample has its own gates, or the batch one row of them."""
        return "batch" if self._shared.reduce == "batch" else "sample"

    @reduce.setter
    def reduce(self, value: Literal["sample", "batch"]) -> None:
        if value not in ("sample", "batch"):
            raise ArgumentError(f"reduce is {value!r}; choose sample or batch")
        self._shared.reduce = value

    @property
    def backend(self) -> str:
        """The backend of `routed_linear`: auto, reference, native or triton."""
        return self._shared.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._shared.backend = value

    def gates(self) -> dict[str, Tensor]:
        """Gates of the latest input that was no decoding step: module path -> B x T (1 x T if reduced)."""
        missing = [unit.path for unit in self.units if unit.kept is None]
        if missing:
            raise ArgumentError(f"{missing[0]} has had no input yet; call the model first")
        return {unit.path: unit.kept.clone() for unit in self.units if unit.kept is not None}

    @torch.no_grad()
    def routers_say(self, gates: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Gates as each router says (B x T), while this model runs as one that is merged by `gates` (T).

        Only routers have a graph: each sees the input that its module would have.
        """
        self._shared.given = given = Given(gates[None])
        try:
            self(*args, **kwargs)
        finally:
            self._shared.given = None
        return given.said

    @torch.no_grad()
    def merge_for(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A plain static model of the architecture, merged by the mean gates of this batch (the model's arguments).

        Its output for this batch is that of this model with reduce="batch".
        """
        before, self.reduce = self.reduce, "batch"
        try:
            self(*args, **kwargs)
        finally:
            self.reduce = before
        return self.static({path: gates[0] for path, gates in self.gates().items()})

    def static(self, gates: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A copy as a plain model: modules mixed by gates (path -> T), or the base's without them."""
        memo: dict[int, Any] = {}
        for layer in self.model.modules():
            if isinstance(layer, RoutedLayer):
                memo[id(layer)] = layer.plain(None if gates is None else gates[layer.unit.path])
        # Hooks hold this object: a plain copy has none.
        self._remove_hooks()
        try:
            return copy.deepcopy(self.model, memo)
        finally:
            self._install_hooks()

    def save_router(self, path: Path | str) -> None:
        """Write the routers to a .safetensors file, or into a directory as wemoe-router.safetensors."""
        write_routers(path, self.spec, self.routers)

    def load_router(self, path: Path | str) -> None:
        """Load a file of `save_router`. Raises CheckpointError if it is not of this model."""
        read_routers(path, self.spec, self.routers)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedModel:
        self._remove_hooks()
        try:
            twin = self.__class__.__new__(self.__class__)
            memo[id(self)] = twin
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        finally:
            self._install_hooks()
        twin._install_hooks()
        return twin

    def _install_hooks(self) -> None:
        for module in _callers(self.model):
            names = tuple(inspect.signature(module.forward).parameters)
            self._hooks += call_hooks(module, self._shared, partial(_parse, names), self._finished)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _finished(self) -> None:
        for unit in self.units:
            unit.reset()


def _routed(path: str, original: nn.Module, tasks: Tasks, bias: Tensor | None, unit: Unit) -> RoutedLayer:
    """Layer that takes the place of another. Raises ArgumentError for one whose weight cannot be mixed."""
    if is_linear(original):
        return RoutedLinear(original, tasks, bias, unit)
    if is_convolution(original):
        return RoutedConvolution(original, tasks, bias, unit)
    raise ArgumentError(
        f"{path} is a {type(original).__name__}, neither a linear layer nor a convolution; list these only"
    )


def _callers(model: nn.Module) -> list[nn.Module]:
    """The model, and the transformers models inside it (stacks of an encoder-decoder, towers), which get masks of
    their own."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return [model]
    return [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]


def _parse(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Mask and cache of a call to a forward with these arguments, by the names that transformers gives them."""
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    seen = int(length()) if length is not None else len(cache or ())
    # Masks of more dimensions say which token sees which, not which is padding.
    return Call(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None, seen > 0, cache is not None)
