"""Names of a model's tensors as PEFT will see them: of modules in memory, which files may call otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection

from pymerge.checkpoint.checkpoint import Checkpoint

_ROUTERS = {"gate", "router"}
# Tensors of Llama and its many kin, which transformers renames in no causal language model. Where a model has others,
# transformers is asked, which takes seconds to import.
_PLAIN = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.("
    r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm|"
    r"self_attn\.([qkvo]_proj|[qk]_norm|rotary_emb)|mlp\.(gate|up|down)_proj))\.(weight|bias|inv_freq)"
)


def names_in_memory(base: Checkpoint) -> dict[str, str]:
    """The name in memory of each tensor of the files; where transformers cannot tell, it is the same.

    Matrices of single experts keep the names that they have in files: PEFT itself stacks factors of those.
    """
    if is_plain(base):
        return {name: name for name in base.tensors}
    from pymerge.adapters.memory_names import modules_in_memory

    memory = {file: module for module, file in reversed(modules_in_memory(base).items())}
    found = {}
    for name in base.tensors:
        module, dot, last = name.rpartition(".")
        found[name] = f"{memory.get(module, module)}{dot}{last}"
    return found


def is_plain(base: Checkpoint) -> bool:
    """Whether a model is a causal language model whose names are known to be the same in files and in memory."""
    config = base.config
    causal = str((config.get("architectures") or [""])[0]).endswith("ForCausalLM") and "text_config" not in config
    return causal and all(_PLAIN.fullmatch(name) for name in base.tensors)


def is_router(name: str, model: Collection[str]) -> bool:
    """Whether a weight chooses among experts that stand beside it: PEFT has no factors for what holds it."""
    module = name.rpartition(".")[0]
    parent, _, last = module.rpartition(".")
    return last in _ROUTERS and any(other.startswith(f"{parent}.experts.") for other in model)
