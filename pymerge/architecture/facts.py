"""Facts about a checkpoint that decide what its tensors are: names, shapes, dtypes, and sizes in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pymerge.architecture.words import is_embedding_name, module_of

Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name -> (dtype code of safetensors, shape)

_HIDDEN_KEYS = {"hidden_size", "n_embd", "d_model", "dim"}
_INNER_KEYS = {"intermediate_size", "moe_intermediate_size", "ffn_dim", "d_ff"}
_EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}


class Facts:
    """Names, shapes and config, looked up once for all tensors."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(shape) for name, (_, shape) in tensors.items()}
        self.dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        configs = list(nested_configs(config))
        self.vocabularies = {
            value for c in configs for key, value in c.items() if str(key).endswith("vocab_size") and _is_size(value)
        }
        self.families = [str(part["model_type"]) for part in configs if part.get("model_type")]
        self.widths = _sizes(configs, _HIDDEN_KEYS | _INNER_KEYS)
        self.experts = _sizes(configs, _EXPERT_KEYS)
        with_experts = [part for part in configs if _sizes([part], _EXPERT_KEYS)]
        self.hidden = _sizes(with_experts, _HIDDEN_KEYS)
        self.inner = _sizes(with_experts, _INNER_KEYS)
        # A block is a numbered module with modules of its own: layers.0.attn.q.weight, but not mlp.0.weight.
        self._blocks = {
            tuple(parts[:i])
            for parts in (name.split(".") for name in self.shapes)
            for i in range(1, len(parts) - 2)
            if parts[i].isdecimal()
        }
        self.embeddings = {
            shape for name, shape in self.shapes.items() if len(shape) == 2 and is_embedding_name(module_of(name))
        }

    def block(self, name: str) -> tuple[str, int | None]:
        """Path of the module list and number of the block, ("", None) outside; the outermost list counts."""
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if parts[i].isdecimal() and tuple(parts[:i]) in self._blocks:
                return ".".join(parts[:i]), int(parts[i])
        return "", None

    def bias(self, name: str) -> int | None:
        """Length of this weight's bias, if it has one: x.bias of x.weight, experts.w_bias of experts.w."""
        candidates = [f"{name}_bias"]
        if name.endswith("weight"):
            candidates.insert(0, name[: -len("weight")] + "bias")
        axes = len(self.shapes[name]) - 1  # a stack of E matrices has E x d_out biases
        for candidate in candidates:
            shape = self.shapes.get(candidate)
            if shape is not None and len(shape) == axes and shape[-1] in self.shapes[name][-2:]:
                return shape[-1]
        return None


def nested_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the configs inside it (text_config, vision_config, ...)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from nested_configs(value)


def _sizes(configs: Sequence[Mapping[str, Any]], keys: set[str]) -> set[int]:
    return {c[key] for c in configs for key in keys if _is_size(c.get(key))}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
