"""Adapter folders in PEFT's form: names of tensors, adapter_config.json, and what vLLM asks of them. Pure.

Every scale is 1: `lora_alpha` is the rank, also where a module's rank is another (`alpha_pattern`), so that readers
that know no patterns compute the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Linear, convolution and Conv1D modules have factors of one name; tables, and parameters of no module, of others. Those
# of experts PEFT stacks itself; a weight is adapted as a parameter, though its module could be.
Form = Literal["module", "table", "parameter", "expert", "weight"]
Bias = Literal["none", "lora_bias", "lora_only", "all"]

# The ranks for which vLLM makes room; --max-lora-rank is one of them, 16 unless it is given.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16


@dataclass(frozen=True)
class Adapted:
    """One pair of factors: a module of the model, or a `parameter` of one, and their rank.

    `depth` counts the parameters of the same module that are wrapped later: PEFT nests them.
    """

    module: str
    rank: int
    form: Form = "module"
    parameter: str = ""
    depth: int = 0

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        inside = f"{PREFIX}{self.module}.{'base_layer.' * self.depth}"
        if self.form == "table":
            return f"{inside}lora_embedding_A", f"{inside}lora_embedding_B"
        return f"{inside}lora_A.weight", f"{inside}lora_B.weight"

    @property
    def path(self) -> str:
        """Name that PEFT's patterns of ranks are held against."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def bias_name(module: str, *, added: bool) -> str:
    """Name of the bias of an adapted module: what is `added` to the base's (lora_bias), or what replaces it."""
    return f"{PREFIX}{module}.{'lora_B.bias' if added else 'base_layer.bias'}"


def saved_name(tensor: str) -> str:
    """Name of a tensor that replaces the base's, of modules_to_save."""
    return f"{PREFIX}{tensor}"


def adapter_config(
    base: str,
    adapted: Sequence[Adapted],
    model: Collection[str],
    *,
    saved: Sequence[str] = (),
    bias: Bias = "none",
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
    tied: bool = False,
) -> bytes:
    """The content of adapter_config.json.

    Args:
        base: the base as its user names it.
        adapted: all pairs of factors, at least one.
        model: names of all tensors of the base.
        saved: modules whose tensors replace the base's.
        bias: what is done to biases: of adapted modules something is added (lora_bias), or they are replaced
            (lora_only); or any may be replaced (all).
        fan_in_fan_out: whether weights are stored d_in x d_out, as in GPT-2.
        task_type: PEFT's word for the kind of model; None leaves it open.
        tied: whether a head is replaced with the table that it is made of.
    """
    rank = max(each.rank for each in adapted)
    ranks = {re.escape(each.path): each.rank for each in adapted if each.rank != rank}
    parameters = sorted({each.path for each in adapted if each.form in ("parameter", "weight")})
    experts = {each.module.rpartition(".")[2] for each in adapted if each.form == "expert"}
    modules = targets([each.module for each in adapted if each.form in ("module", "table")], model)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted({*modules, *experts}),
        "target_parameters": parameters or None,
        "modules_to_save": sorted(saved) or None,
        "bias": "none" if bias == "lora_bias" else bias,
        "lora_bias": bias == "lora_bias",
        "fan_in_fan_out": fan_in_fan_out,
        "ensure_weight_tying": tied,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def targets(modules: Iterable[str], model: Collection[str]) -> list[str]:
    """The target_modules that PEFT finds exactly these modules by: last words of names where all modules of the model
    that end so are adapted, whole paths otherwise."""
    wanted = set(modules)
    paths = {path for name in model for path in _parents(name)} | wanted
    by_word: dict[str, set[str]] = {}
    for path in paths:
        by_word.setdefault(path.rpartition(".")[2], set()).add(path)
    found = set()
    for path in wanted:
        word = path.rpartition(".")[2]
        found.add(word if by_word[word] <= wanted and not word.isdecimal() else path)
    return sorted(found)


def replaced(modules: Iterable[str], model: Iterable[str]) -> dict[str, list[str]]:
    """The modules that PEFT replaces for these modules_to_save, with the tensors of each: it takes every module whose
    path ends like one of them, whatever stands before."""
    inside: dict[str, list[str]] = {}
    for name in model:
        inside.setdefault(name.rpartition(".")[0], []).append(name)
    wanted = tuple(modules)
    return {module: names for module, names in inside.items() if wanted and module.endswith(wanted)}


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type of a model with this config.json, where it changes nothing about which keys a file must have."""
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if architecture.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return None


def vllm_note(rank: int, *, plain: bool = True) -> str:
    """Note on vLLM for an adapter of this rank; `plain`: without tensors that replace the base's, and biases."""
    if not plain:
        return "vLLM does not load it: it has modules_to_save or biases; leave them out for vLLM"
    fits = next((each for each in VLLM_RANKS if each >= rank), None)
    if fits is None:
        return f"vLLM does not load rank {rank}: {VLLM_RANKS[-1]} is its largest; give --rank or --max-rank"
    default = f" (its default, {_VLLM_DEFAULT}, will do)" if fits <= _VLLM_DEFAULT else ""
    return f"vLLM: --max-lora-rank {max(fits, _VLLM_DEFAULT if default else 0)}{default}"


def _parents(name: str) -> list[str]:
    """Paths of the modules that a tensor is in."""
    words = name.split(".")[:-1]
    return [".".join(words[: count + 1]) for count in range(len(words))]
