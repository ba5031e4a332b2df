"""Small random models in forms that differ by version and tool: other names of the same tensors, experts in stacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

HIDDEN, INNER, VOCABULARY, EXPERTS, POSITIONS = 6, 5, 9, 3, 8
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BLOCK = re.compile(r"(layers\.\d+\.)")


@dataclass(frozen=True)
class Parts:
    """What a family of models has beside attention and norms."""

    blocks: int = 2
    mixture: bool = False
    tower: bool = False
    convolution: bool = False
    pooler: bool = False
    prediction: bool = False
    tied: bool = False


def shapes_of(parts: Parts) -> dict[str, tuple[int, ...]]:
    """Plain names of a family and the shape of each tensor, without constants; a tied head is not stored."""
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, HIDDEN)}
    for block in range(parts.blocks):
        inside = f"model.layers.{block}"
        found |= {f"{inside}.attn.{name}.weight": (HIDDEN, HIDDEN) for name in ("q_proj", "o_proj")}
        found |= {f"{inside}.attn.q_proj.bias": (HIDDEN,)}
        found |= {f"{inside}.LayerNorm.weight": (HIDDEN,), f"{inside}.LayerNorm.bias": (HIDDEN,)}
        if not parts.mixture:
            found[f"{inside}.mlp.up_proj.weight"] = (INNER, HIDDEN)
            continue
        found[f"{inside}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            found |= {
                f"{inside}.mlp.experts.{expert}.{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")
            }
            found[f"{inside}.mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    found["model.norm.weight"] = (HIDDEN,)
    if parts.tower:
        found |= {f"visual.blocks.{block}.attn.q_proj.weight": (HIDDEN, HIDDEN) for block in range(2)}
        found["visual.merger.weight"] = (HIDDEN, HIDDEN)
    if parts.convolution:
        found |= {"model.conv.weight_g": (1, 1, 3), "model.conv.weight_v": (HIDDEN, 2, 3)}
    if parts.pooler:
        found |= {"pooler.dense.weight": (HIDDEN, HIDDEN), "pooler.dense.bias": (HIDDEN,)}
    if parts.prediction:
        found |= {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN), "mtp.layers.0.attn.q_proj.weight": (HIDDEN, HIDDEN)}
    if not parts.tied:
        found[HEAD] = (VOCABULARY, HIDDEN)
    return found


def constants_of(parts: Parts, positions: int = POSITIONS) -> Tensors:
    """A causal mask, as GPT-2 calls it, and frequencies for each block."""
    mask = torch.ones(positions, positions).tril().view(1, 1, positions, positions)
    found = {f"model.layers.{block}.attn.bias": mask.clone() for block in range(parts.blocks)}
    return found | {
        f"model.layers.{block}.attn.rotary.inv_freq": 1e4 ** -torch.arange(3.0) for block in range(parts.blocks)
    }


@dataclass(frozen=True)
class Form:
    """How a model stores a family: what becomes of its plain names."""

    beginning: str = "plain"
    old_norms: bool = False
    new_convolution: bool = False
    stacked: bool = False
    words: str = "gate_proj"

    def store(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """The tensors under this form's names; all experts of a stack must be there."""
        found = dict(tensors)
        if self.stacked:
            found = _stacked(found)
        elif self.words == "w1":
            found = {_in_words(name): tensor for name, tensor in found.items()}
        return {self._name(name): tensor for name, tensor in found.items()}

    def _name(self, name: str) -> str:
        if self.old_norms:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if self.new_convolution:
            name = name.replace("weight_g", "parametrizations.weight.original0")
            name = name.replace("weight_v", "parametrizations.weight.original1")
        return BEGINNINGS[self.beginning](name)


def _language(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _llava(name: str) -> str:
    return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name


BEGINNINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "bare": lambda name: name.removeprefix("model."),
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "inside": lambda name: _BLOCK.sub(r"\1_orig_mod.", name),
    "language": _language,
    "llava": _llava,
}


def _in_words(name: str) -> str:
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    stem, _, rest = name.partition(".experts.")
    if not rest:
        return name
    number, word, weight = rest.split(".")
    return f"{stem}.experts.{number}.{words[word]}.{weight}"


def _stacked(tensors: Tensors) -> Tensors:
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for stem in sorted({name.partition(".experts.")[0] for name in tensors.keys() - found.keys()}):
        gate, up, down = (
            torch.stack([tensors[f"{stem}.experts.{number}.{word}.weight"] for number in range(EXPERTS)])
            for word in ("gate_proj", "up_proj", "down_proj")
        )
        found |= {f"{stem}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.experts.down_proj": down}
    return found


@dataclass
class Model:
    """A model of a family: weights and constants under plain names, its form, its dtype, and tensors of no one else."""

    weights: Tensors
    constants: Tensors
    form: Form = field(default_factory=Form)
    dtype: torch.dtype = torch.float32
    head_copy: bool = False
    others: Tensors = field(default_factory=dict)

    def stored(self) -> Tensors:
        """What its file holds."""
        weights = {name: tensor.to(self.dtype) for name, tensor in self.weights.items()}
        if self.head_copy:
            weights[HEAD] = weights[EMBEDDING].clone()
        own = self.form.store(weights | self.constants)
        return {name: tensor.contiguous() for name, tensor in (own | self.others).items()}

    def values(self, name: str) -> torch.Tensor:
        """A weight as it is stored, in float64."""
        return self.weights[name].to(self.dtype).double()


def config_of(parts: Parts, tied: bool | None) -> dict[str, Any]:
    """The config.json of a family; `tied` None leaves the head unsaid."""
    config: dict[str, Any] = {"model_type": "made_up", "hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    config["num_hidden_layers"] = parts.blocks
    return config | ({} if tied is None else {"tie_word_embeddings": tied})
