"""A live model with adapters of PEFT, as plans see models: the base under the names that it has without adapters, and
each adapter as its folder would be, but for its files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pymerge.adapters.apply import adapted
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.settings import Scale, Settings, read_settings
from pymerge.architecture.tied import ties
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.model_files import ADAPTER_CONFIG
from pymerge.common.libraries import require
from pymerge.common.names import nearest
from pymerge.errors import ArgumentError
from pymerge.integrations.peft.biases import Base, is_bias, own_biases
from pymerge.integrations.peft.layers import matrix_of, of_layer, of_replaced, real
from pymerge.integrations.peft.unreadable import unreadable
from pymerge.live.checkpoints import hold

BASE = "the model"
# What of a LoraConfig decides values beside what the layers themselves have: these say how they were made.
_MADE_BY = ("rank_pattern", "alpha_pattern", "init_lora_weights", "base_model_name_or_path", "target_modules")


@dataclass(frozen=True)
class _Layer:
    """A module of PEFT around one of the model's, at its path there; `depth` others are around it."""

    path: str
    module: Any
    depth: int = 0

    @property
    def parameter(self) -> str:
        """The parameter of a module that it is of; "" for a whole module."""
        return str(getattr(self.module, "parameter_name", ""))


@dataclass
class Live:
    """The weights of a live model by their plain names, and its adapters.

    Raises ArgumentError where the model has none, or some that cannot be merged.
    """

    model: nn.Module
    original: Base | None = None  # the model as it was before adapters trained its biases
    parameters: dict[str, Tensor] = field(default_factory=dict)
    layers: list[_Layer] = field(default_factory=list)  # with factors
    replaced: list[_Layer] = field(default_factory=list)  # modules_to_save, and rows of tables

    def __post_init__(self) -> None:
        require("peft")
        import peft

        self._wrapper: Any = peft.utils.other.AuxiliaryTrainingWrapper
        self._tuner: Any = peft.tuners.tuners_utils.BaseTunerLayer
        self._whole: Any = peft.tuners.tuners_utils.BaseTuner
        self.configs: Mapping[str, Any] = getattr(self.model, "peft_config", None) or {}
        if not self.configs:
            raise ArgumentError("the model has no adapters of PEFT; load some (peft.PeftModel.from_pretrained) first")
        self._seen: set[int] = set()
        list(self.model.named_modules())  # which has nn.MultiheadAttention take back its weights after a forward pass
        self._visit(self.root, "", 0)
        self.base = self._held()
        self.biases: dict[str, HeldEntry] = {}  # the model's own, where an adapter has trained them
        if self.original is not None and self._biased:
            names = [name for adapter in self._biased for name in self._trained_biases(adapter)]
            self.biases = own_biases(self.base, self.original, names)
            self.base = replace(self.base, tensors={**self.base.tensors, **self.biases})

    @property
    def root(self) -> nn.Module:
        """The model that the adapters are on."""
        inner = getattr(self.model, "get_base_model", None)
        if inner is not None:
            whole: nn.Module = inner()
            return whole
        found: nn.Module = self.model.model if isinstance(self.model, self._whole) else self.model
        return found

    def adapter(self, name: str) -> Checkpoint:
        """An adapter on the base. Raises CheckpointError for what cannot be merged."""
        self._check(name)
        where = Path(f"adapter {name}")
        tensors = hold(str(where), dict(self.tensors(name))).tensors
        said = {key: value for key, value in self.configs[name].to_dict().items() if key not in _MADE_BY}
        config = {key: list(value) if isinstance(value, (set, frozenset)) else value for key, value in said.items()}
        settings = read_settings(where / ADAPTER_CONFIG, config)
        files = AdapterFiles(where, where, config, tensors, {}, (), ())
        return adapted(self.base, files, _LiveSettings(**vars(settings), scales=self._scales(name)))

    @property
    def ties(self) -> bool:
        """Whether the model's head is its table of tokens."""
        return bool(ties(self.base.config))

    def trained_rows(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Rows of tables that some of these adapters train, by the paths of their modules."""
        found: dict[str, set[int]] = {}
        for layer in self.replaced:
            adapter = getattr(layer.module, "token_adapter", None)
            if adapter is not None and adapter.tied_adapter is None:
                rows = {row for name in names for row in adapter.token_indices.get(name, ())}
                found.setdefault(layer.path, set()).update(rows)
        return {path: sorted(rows) for path, rows in found.items() if rows}

    def unload(self) -> nn.Module:
        """Take all of PEFT out of the model, which keeps its own weights; returns it."""
        root = self.root
        self._unwrap(root)
        if "peft_config" in vars(root):
            del root.peft_config
        if "_hf_peft_config_loaded" in vars(root):  # transformers' own word for it
            vars(root)["_hf_peft_config_loaded"] = False
        return root

    def _unwrap(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            inner = child
            while (own := self._inside(inner)) is not None:
                inner = own
            if inner is not child:
                setattr(module, name, inner)
            self._unwrap(inner)

    def _inside(self, module: Any) -> Any:
        """Module that one of PEFT is around; None for any other module."""
        if isinstance(module, self._wrapper):
            adapter = getattr(module, "token_adapter", None)
            return module.original_module if adapter is None else adapter.base_layer
        return module.base_layer if isinstance(module, self._tuner) else None

    def _check(self, name: str) -> None:
        """Raise ArgumentError for an adapter that cannot be merged as it is in this model."""
        config = self.configs.get(name)
        if config is None:
            near = nearest(name, self.configs)
            raise ArgumentError(
                f"the model has no adapter {name!r}; "
                + (f"did you mean {near!r}?" if near else f"it has {', '.join(self.configs)}")
            )
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ArgumentError(
                f"adapter {name!r} is of type {kind}, and only LORA has factors to merge; leave it out, or turn it "
                "into LoRA with peft.tuners.lora.conversion.save_as_lora"
            )
        for layer in (*self.layers, *self.replaced):
            if merged := list(getattr(layer.module, "merged_adapters", ())):
                raise ArgumentError(
                    f"{layer.path}: {', '.join(map(repr, merged))} {'is' if len(merged) == 1 else 'are'} merged into "
                    "the model's weights; take that back first with unmerge_adapter()"
                )

    @property
    def _biased(self) -> list[str]:
        """Adapters that train biases of the model."""
        return [name for name, config in self.configs.items() if getattr(config, "bias", "none") != "none"]

    def check_biases(self, names: Collection[str], remedy: str) -> None:
        """Raise ArgumentError if one of these adapters has trained biases of the model, whose own are lost."""
        for name in self._biased:
            if name in names and self.original is None:
                raise ArgumentError(
                    f"adapter {name!r} has bias={self.configs[name].bias!r}: its biases are in place of the model's "
                    f"own, which are lost, and all adapters have them; {remedy}"
                )

    def _trained_biases(self, name: str) -> list[str]:
        """The model's biases that an adapter has trained: all, or those of the modules with factors."""
        saved = {layer.path for layer in self.replaced if name in getattr(layer.module, "modules_to_save", {})}
        adapted = {layer.path for layer in self.layers}
        biases = [each for each in self.parameters if is_bias(each) and each.rpartition(".")[0] not in saved]
        return [each for each in biases if self.configs[name].bias == "all" or each.rpartition(".")[0] in adapted]

    def _visit(self, module: Any, path: str, depth: int) -> None:
        """Gather weights and modules of PEFT, from a module of the model at this path on."""
        inner = self._inside(module)
        if inner is not None:
            replaces = isinstance(module, self._wrapper)
            (self.replaced if replaces else self.layers).append(_Layer(path, module, depth))
            self._visit(inner, path, depth if replaces else depth + 1)
            return
        for name, tensor in {**module._parameters, **module._buffers}.items():
            left_out = tensor is None or name in module._non_persistent_buffers_set
            if not left_out and id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                self.parameters[f"{path}.{name}".lstrip(".")] = tensor
        for name, child in module.named_children():
            self._visit(child, f"{path}.{name}".lstrip("."), 0)

    def _held(self) -> Checkpoint:
        sizes = {layer.path: matrix_of(layer.module) for layer in self.layers if not layer.parameter}
        found: dict[str, Tensor] = {}
        others: dict[str, TensorEntry] = {}
        for name, tensor in self.parameters.items():
            module, _, last = name.rpartition(".")
            size = sizes.get(module) if last == "weight" else None
            if tensor.is_meta:
                why = "is on the meta device (offloaded); load the model without offloading"
                others[name] = unreadable(BASE, name, tuple(tensor.shape), why)
            elif tensor.dtype.is_floating_point and tensor.element_size() > 1:
                found[name] = tensor
            elif size is not None:
                why = f"is quantised ({tensor.dtype}); take that back first (model.dequantize())"
                others[name] = unreadable(BASE, name, size, why)
        held = hold(BASE, found, self._config())
        return replace(held, files=(), stamps={}, tensors={**held.tensors, **others})

    def _config(self) -> dict[str, Any]:
        """config.json of the model; empty for one that has none."""
        config: Any = getattr(self.root, "config", None)
        if not hasattr(config, "to_json_string"):
            return {}
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        if not found.get("architectures"):  # which save_pretrained adds
            found["architectures"] = [type(self.root).__name__]
        return {key: value for key, value in found.items() if key != "quantization_config"}

    def _scales(self, name: str) -> dict[str, Scale]:
        """Scale and rank of each module, or parameter of one, as they are now."""
        found = {}
        for layer in self.layers:
            if name in getattr(layer.module, "scaling", {}):
                path = f"{layer.path}.{layer.parameter}" if layer.parameter else layer.path
                found[path] = Scale(layer.module.scaling[name], layer.module.r[name])
        return found

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """All that an adapter has, under the keys that a file has for it."""
        outer = {layer.path for layer in self.layers if isinstance(layer.module.base_layer, nn.MultiheadAttention)}
        for layer in self.layers:
            parent, _, last = layer.path.rpartition(".")
            path = f"{parent}.base_layer.{last}" if parent in outer else layer.path
            for key, tensor in of_layer(layer.module, name):
                yield f"{path}.{'base_layer.' * layer.depth}{key}", real(tensor, layer.path, name)
        for layer in self.replaced:
            for key, tensor in of_replaced(layer.module, name):
                yield f"{layer.path}.{key}", real(tensor, layer.path, name)
        for path in self._trained_biases(name) if self.biases and name in self._biased else ():
            yield path, self.parameters[path]


@dataclass(frozen=True)
class _LiveSettings(Settings):
    """Settings of an adapter's config, with the scales that its layers have."""

    scales: Mapping[str, Scale] = field(default_factory=dict)

    def scale(self, module: str) -> Scale:
        return self.scales[module]


def read_adapters(live: Live, names: Sequence[str]) -> dict[str, Checkpoint]:
    """Adapters by names that a config can have. Raises ArgumentError for a list that is no list of names."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"adapters is {names!r}; give a list of names of adapters of the model")
    if len(set(names)) < len(names):
        raise ArgumentError(f"adapters is {list(names)!r}; name each of them once")
    return {f"adapter {name}".replace("+", "_"): live.adapter(name) for name in names}
