"""config.json of a GGUF file: what its values and shapes tell of the model, under the names of transformers."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_DECODER = {
    **_SIZES,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# What Llama 3.1 and later have; a file holds the factors that follow from it, and not the settings themselves.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Said(NamedTuple):
    """Facts that a file tells: its values (of `read_values`), shapes under the names of transformers, and the
    numbers of the tensors that stand for settings of rotary embeddings."""

    values: Mapping[str, Any]
    shapes: Shapes
    factors: Mapping[str, Sequence[float]]

    def rows(self, name: str) -> int | None:
        """Rows of the first block's tensor whose name ends so."""
        return next((shape[0] for key, shape in self.shapes.items() if key.endswith(name)), None)

    def has(self, name: str) -> bool:
        return self.rows(name) is not None


class _Recipe(NamedTuple):
    model_type: str
    architecture: str
    keys: Mapping[str, str]
    more: Callable[[Said, dict[str, Any]], None] | None = None


def config_of(architecture: str, said: Said, dtype: str) -> dict[str, Any]:
    """The config.json of one of the architectures of `names`. What GGUF does not hold is left to the defaults of
    transformers."""
    recipe = _RECIPES[architecture]
    config: dict[str, Any] = {"model_type": recipe.model_type, "architectures": [recipe.architecture]}
    for key, ours in recipe.keys.items():
        value = said.values.get(key)
        if value is not None:
            config[ours] = _number(value)
    config["vocab_size"] = (
        said.rows("embed_tokens.weight") or said.rows("wte.weight") or said.rows("word_embeddings.weight")
    )
    for key, ours in _TOKENS.items():
        if key in said.values:
            config[ours] = said.values[key]
    if architecture != "bert":
        config["tie_word_embeddings"] = not said.has("lm_head.weight")
    if recipe.more is not None:
        recipe.more(said, config)
    config["torch_dtype"] = dtype
    return config


def _number(value: Any) -> Any:
    """A float of 32 bits as the shortest number that means it, as people write it; a list of equal numbers as one."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    if isinstance(value, float) and math.isfinite(value):
        texts = (f"{value:.{digits}g}" for digits in range(1, 10))
        return next((float(text) for text in texts if struct.pack("f", float(text)) == struct.pack("f", value)), value)
    return value


def _head_dim(said: Said, config: dict[str, Any]) -> None:
    rows, heads = said.rows("q_proj.weight"), config.get("num_attention_heads")
    if rows and heads:
        config["head_dim"] = rows // heads


def _rope_scaling(said: Said, config: dict[str, Any]) -> None:
    kind, factor = said.values.get("rope.scaling.type"), said.values.get("rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        scaling = {"rope_type": kind, "factor": _number(factor)}
        original = said.values.get("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            scaling["original_max_position_embeddings"] = original
        config["rope_scaling"] = scaling


def _llama(said: Said, config: dict[str, Any]) -> None:
    _head_dim(said, config)
    _rope_scaling(said, config)
    if said.values.get("expert_count"):
        config["model_type"], config["architectures"] = "mixtral", ["MixtralForCausalLM"]
        config["num_local_experts"] = said.values["expert_count"]
        config["num_experts_per_tok"] = said.values.get("expert_used_count", 2)
    elif any("mistral" in str(said.values.get(key)).lower() for key in ("general.name", "general.basename")):
        # The same architecture in GGUF, and but for its config in transformers. All its blocks look at all tokens.
        config["model_type"], config["architectures"] = "mistral", ["MistralForCausalLM"]
        config["sliding_window"] = None
    else:
        config["attention_bias"], config["mlp_bias"] = said.has("q_proj.bias"), said.has("up_proj.bias")
    if "rope_freqs.weight" in said.factors:
        scaling = llama3_scaling(said.factors["rope_freqs.weight"], config.get("rope_theta", 10000.0))
        if scaling is not None:
            config["rope_scaling"] = scaling


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The rope_scaling of Llama 3 that gives these factors of frequencies; None if its usual settings do not."""
    factor = max(factors, default=0.0)
    if factor < 1:
        return None
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    for index, found in enumerate(factors):
        turns = context / (2 * math.pi * theta ** (index / len(factors)))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not math.isclose(found, expected, rel_tol=1e-4):
            return None
    return {"rope_type": "llama3", "factor": _number(factor), **_LLAMA3}


def _qwen(said: Said, config: dict[str, Any]) -> None:
    _rope_scaling(said, config)


def _qwen3(said: Said, config: dict[str, Any]) -> None:
    _head_dim(said, config)
    _rope_scaling(said, config)
    config["attention_bias"] = said.has("q_proj.bias")


def _qwen2_moe(said: Said, config: dict[str, Any]) -> None:
    _rope_scaling(said, config)
    config["moe_intermediate_size"] = said.rows("experts.0.gate_proj.weight")
    config["shared_expert_intermediate_size"] = said.rows("shared_expert.gate_proj.weight")


def _qwen3_moe(said: Said, config: dict[str, Any]) -> None:
    _qwen3(said, config)
    config["moe_intermediate_size"] = said.rows("experts.0.gate_proj.weight")
    config["norm_topk_prob"] = True  # so llama.cpp computes, and so all models of this type are


def _gemma(said: Said, config: dict[str, Any]) -> None:
    _head_dim(said, config)
    _rope_scaling(said, config)


def _gemma23(said: Said, config: dict[str, Any]) -> None:
    """Gemma 2 and 3 of 27 billion parameters, which have so many blocks, scale queries by the hidden size of a head."""
    _gemma(said, config)
    largest = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    if config.get("num_hidden_layers") == largest:
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    elif "head_dim" in config:
        config["query_pre_attn_scalar"] = config["head_dim"]


def _phi3(said: Said, config: dict[str, Any]) -> None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    turned = said.values.get("rope.dimension_count")
    if heads and hidden and turned and turned * heads != hidden:
        config["partial_rotary_factor"] = turned * heads / hidden
    config["original_max_position_embeddings"] = said.values.get(
        "rope.scaling.original_context_length", config.get("max_position_embeddings")
    )
    config["sliding_window"] = config.get("sliding_window") or None
    long, short = (said.factors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long and short:
        config["rope_scaling"] = {
            "type": "longrope",
            "long_factor": [_number(each) for each in long],
            "short_factor": [_number(each) for each in short],
        }


def _olmo2(said: Said, config: dict[str, Any]) -> None:
    _rope_scaling(said, config)
    if "attention.sliding_window" not in said.values:
        return
    config["model_type"], config["architectures"] = "olmo3", ["Olmo3ForCausalLM"]
    config["sliding_window"] = said.values["attention.sliding_window"]
    pattern = said.values.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _cohere(said: Said, config: dict[str, Any]) -> None:
    config["use_qk_norm"] = said.has("q_norm.weight")


def _starcoder2(said: Said, config: dict[str, Any]) -> None:
    config["use_bias"] = said.has("q_proj.bias")


def _gpt2(said: Said, config: dict[str, Any]) -> None:
    config["n_positions"] = config["n_ctx"] = said.rows("wpe.weight")
    if config.get("n_inner") == 4 * config.get("n_embd", 0):
        config["n_inner"] = None


def _bert(said: Said, config: dict[str, Any]) -> None:
    config["type_vocab_size"] = said.rows("token_type_embeddings.weight")
    config["max_position_embeddings"] = said.rows("position_embeddings.weight")


_RECIPES = {
    "llama": _Recipe("llama", "LlamaForCausalLM", _DECODER, _llama),
    "smollm3": _Recipe("smollm3", "SmolLM3ForCausalLM", _DECODER, _qwen),
    "qwen2": _Recipe("qwen2", "Qwen2ForCausalLM", _DECODER, _qwen),
    "qwen3": _Recipe("qwen3", "Qwen3ForCausalLM", _DECODER, _qwen3),
    "qwen2moe": _Recipe("qwen2_moe", "Qwen2MoeForCausalLM", _DECODER | _EXPERTS, _qwen2_moe),
    "qwen3moe": _Recipe("qwen3_moe", "Qwen3MoeForCausalLM", _DECODER | _EXPERTS, _qwen3_moe),
    "gemma": _Recipe("gemma", "GemmaForCausalLM", _DECODER, _gemma),
    "gemma2": _Recipe("gemma2", "Gemma2ForCausalLM", _DECODER | _SOFTCAPS, _gemma23),
    "gemma3": _Recipe("gemma3_text", "Gemma3ForCausalLM", _DECODER | _SOFTCAPS, _gemma23),
    "phi3": _Recipe("phi3", "Phi3ForCausalLM", _DECODER | {"attention.sliding_window": "sliding_window"}, _phi3),
    "olmo2": _Recipe("olmo2", "Olmo2ForCausalLM", _DECODER, _olmo2),
    "command-r": _Recipe(
        "cohere",
        "CohereForCausalLM",
        _DECODER | {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        _cohere,
    ),
    "starcoder2": _Recipe(
        "starcoder2", "Starcoder2ForCausalLM", _DECODER | {"attention.layer_norm_epsilon": "norm_epsilon"}, _starcoder2
    ),
    "gpt2": _Recipe(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
            "context_length": "n_positions",
            "feed_forward_length": "n_inner",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        _gpt2,
    ),
    "bert": _Recipe("bert", "BertModel", _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"}, _bert),
}
