"""Names of a model's tensors as PEFT will see them: of modules in memory, which files may call otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pymerge.checkpoint.checkpoint import Checkpoint

_ROUTERS = {"gate", "router"}
# A matrix of one of the experts of a block: PEFT stacks their factors, which must have one rank.
_NUMBERED = re.compile(r".*\bexperts\.\d+\..*\.weight")
# Types of models whose numbered experts PEFT 0.21 stacks under transformers 5, as Mixtral's or as Qwen2-MoE's
# (peft.utils.transformers_weight_conversion, but for qwen2_moe itself, which it has forgotten), with the last words of
# the modules that it takes for experts, wherever they are.
_STACKED = {
    ("gate", "w1", "w2", "w3"): ("minimax", "minimax_m2", "mixtral"),
    ("gate", "gate_proj", "up_proj", "down_proj"): (
        "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
        "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker", "solar_open",
    ),
}  # fmt: skip
# Tensors of Llama and its many kin, which transformers renames in no causal language model. Where a model has others,
# transformers is asked, which takes seconds to import.
_PLAIN = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.("
    r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm|"
    r"self_attn\.([qkvo]_proj|[qk]_norm|rotary_emb)|mlp\.(gate|up|down)_proj))\.(weight|bias|inv_freq)"
)


def names_in_memory(base: Checkpoint) -> dict[str, str]:
    """The name in memory of each tensor of the files; where transformers cannot tell, it is the same.

    Matrices of single experts that memory has in stacks keep the names of the files where PEFT stacks factors of those
    (`stacked_words`), and have none elsewhere.
    """
    if is_plain(base):
        return {name: name for name in base.tensors}
    from pymerge.adapters.memory_names import modules_in_memory

    memory = {file: module for module, file in reversed(modules_in_memory(base).items())}
    stacks = bool(memory) and not stacked_words(base.config)
    found = {}
    for name in base.tensors:
        module, dot, last = name.rpartition(".")
        if stacks and is_numbered(name) and module not in memory:
            continue
        found[name] = f"{memory.get(module, module)}{dot}{last}"
    return found


def is_plain(base: Checkpoint) -> bool:
    """Whether a model is a causal language model whose names are known to be the same in files and in memory."""
    config = base.config
    causal = str((config.get("architectures") or [""])[0]).endswith("ForCausalLM") and "text_config" not in config
    return causal and all(_PLAIN.fullmatch(name) for name in base.tensors)


def is_numbered(name: str) -> bool:
    """Whether a tensor is a matrix of a single expert."""
    return bool(_NUMBERED.fullmatch(name))


def stacked_words(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Last words of modules that PEFT takes for matrices of experts, whose factors it stacks; none for most models."""
    return next((words for words, types in _STACKED.items() if config.get("model_type") in types), ())


def is_router(name: str, model: Collection[str]) -> bool:
    """Whether a weight chooses among experts that stand beside it: PEFT has no factors for what holds it."""
    module = name.rpartition(".")[0]
    parent, _, last = module.rpartition(".")
    return last in _ROUTERS and any(other.startswith(f"{parent}.experts.") for other in model)
