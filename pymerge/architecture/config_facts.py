"""Facts that a config.json tells of its weights, by meaning, however its keys are spelt.

A rule on names of keys, not a table of architectures. transformers 5 has `rope_parameters.rope_theta` where 4 had
`rope_theta`; a language model inside another one stands under `text_config`; what is null, or not used, says nothing.
Shapes and tied heads are not here: the tensors tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pymerge.architecture.config_defaults import DEFAULTS

# Configs of the language model inside another one's: their keys mean what they mean at the top.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_SKIPPED_PARTS = (
    *("quantization_config", "id2label", "label2id", "task_specific_params", "auto_map", "pruned_heads"),
    *("rope_parameters", "rope_scaling"),
)

HEADS = re.compile(r"(^|_)(heads|(n|num|d|dim)_head|n_head_kv|head_dim|attention_head_size|d_kv|kv_channels)$")
ACTIVATION = re.compile(r"(^|_)(act|act_fn|activation|activation_fn|activation_function)$|^feed_forward_proj$")
TOKEN_ID = re.compile(r"_token_id$")
_MATTERS = re.compile(
    "|".join(
        [
            HEADS.pattern,
            ACTIVATION.pattern,
            TOKEN_ID.pattern,
            # positions
            r"rope|rotary|alibi|position_embeddings?_type|sinusoidal|max_position|max_seq|relative|pos_att_type",
            # norms, and the path around blocks
            r"(^|_)(eps|epsilon)$|(pre|post)_?(layer)?norm|norm_(type|position|before|after)|normalize_before",
            r"layer_norm_before|(^|_)residual(_|$)|parallel_attn|qk_?(layer)?norm|qk_ln|sandwich|decoder_architecture",
            # attention
            r"window|layer_types|layers_block_type|attention_types|attention_chunk|bidirectional|multi_query|clip_qkv",
            r"(^|_)bias$|is_(causal|decoder)$|gated_act|swiglu",
            # factors
            r"multiplier|scaling|(^|_)scale(_|$)|softcap|logit|pre_attn_scalar|temperature_tuning|(^|_)mup|model_base",
            # experts
            r"expert|topk|moe_|scoring_func|n_group|decoder_sparse_step|mlp_only_layers|first_k_dense",
            # towers
            r"patch_size|^image_size$|spatial_merge|feature_layer|select_strategy|downsample_ratio|pixel_shuffle|fullatt",
            r"^tie_encoder_decoder$|^model_type$|^hidden_size$|time_step_limit",
        ]
    )
)
# Of training, of heads of tasks, of generation, of how things are computed.
_NOISE = re.compile(
    r"init|drop|loss|coef|classifier|summary|jitter|quant|label|forced|suppress|gradient|contrastive|capacity|fp32|"
    r"_to_keep$|^max_window_|^output_(router|att|aux|hid|scores)|^return_"
)
_ALIASES = {
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_head_kv": "num_key_value_heads",
    "n_embd": "hidden_size",
    "activation_function": "hidden_act",
    "activation": "hidden_act",
    "hidden_activation": "hidden_act",
    "n_positions": "max_position_embeddings",
    "rotary_emb_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "local_rope_theta": "rope_local_base_freq",
    "rotary_pct": "partial_rotary_factor",
    "rope_pct": "partial_rotary_factor",
    "image_token_index": "image_token_id",
    "video_token_index": "video_token_id",
}
_SAME_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
}
_ROPE_TYPES = {"mrope": "default", "su": "longrope"}


@dataclass(frozen=True)
class Fact:
    """Fact of a config: the key as it is spelt there, its value as it stands there, and what is compared."""

    key: str
    shown: Any
    value: Any
    default: bool = False  # the config leaves it out


def facts(config: Mapping[str, Any]) -> dict[str, Fact]:
    """Facts about the weights of a config, by meaning: "rope_theta", "vision_config.hidden_act".

    A language model's inner config wins over what is around it. `rope_scaling.rope_type` is there only if positions are
    scaled.
    """
    found: dict[str, Fact] = {}
    for spelt, meant, part in _parts(config, "", ""):
        here: dict[str, Fact] = {}
        for name, fact in _said(part, spelt):
            if fact.value is not None or name not in here:
                here[name] = fact
        _settle(here, str(part.get("model_type")))
        for name, fact in here.items():
            if fact.value is not None or meant + name not in found:
                found[meant + name] = fact
    return found


def _parts(config: Mapping[str, Any], spelt: str, meant: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The config and those inside it, with the path of each as it is spelt and as it is meant; inner ones later."""
    yield spelt, meant, config
    for key, part in config.items():
        if isinstance(part, Mapping) and key not in _SKIPPED_PARTS:
            yield from _parts(part, f"{spelt}{key}.", meant if key in TEXT_PARTS else f"{meant}{key}.")


def _said(part: Mapping[str, Any], spelt: str) -> Iterator[tuple[str, Fact]]:
    """Facts of one part, by meaning inside it."""
    newer = part.get("hidden_activation") is not None  # Gemma's, which wins over hidden_act
    for key, value in part.items():
        name = _ALIASES.get(key, key)
        if isinstance(value, Mapping) or (newer and key == "hidden_act"):
            continue
        if _MATTERS.search(name) and not _NOISE.search(name) and _is_of_kind(name, value):
            yield name, Fact(spelt + key, value, normal(name, value))
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(scaling := part.get(key), Mapping):
            yield from _rope(scaling, f"{spelt}{key}.")


def _rope(scaling: Mapping[str, Any], spelt: str) -> Iterator[tuple[str, Fact]]:
    """Facts of rope_scaling or rope_parameters; with one set for each type of layer, those of full attention count."""
    local = scaling.get("sliding_attention")
    if isinstance(local, Mapping) and (theta := local.get("rope_theta")) is not None:
        yield "rope_local_base_freq", Fact(f"{spelt}sliding_attention.rope_theta", theta, normal("", theta))
    if isinstance(full := scaling.get("full_attention"), Mapping):
        scaling, spelt = full, f"{spelt}full_attention."
    for key, value in scaling.items():
        if isinstance(value, Mapping) or (key == "type" and "rope_type" in scaling):
            continue
        compared = normal("", value)
        if key in ("rope_theta", "partial_rotary_factor"):
            yield key, Fact(spelt + key, value, compared)
        elif key in ("type", "rope_type"):
            yield "rope_scaling.rope_type", Fact(spelt + key, value, _ROPE_TYPES.get(str(value), compared))
        else:
            yield f"rope_scaling.{key}", Fact(spelt + key, value, compared)


def _settle(found: dict[str, Fact], model_type: str) -> None:
    """Put together what several keys of a part say: how positions are scaled, whether there is a window."""
    kind, original = found.get("rope_scaling.rope_type"), found.pop("original_max_position_embeddings", None)
    if kind is None or kind.value in (None, "default"):
        for name in [name for name in found if name.startswith("rope_scaling.") and not name.endswith("_section")]:
            del found[name]
    elif original is not None:
        found.setdefault("rope_scaling.original_max_position_embeddings", original)
    for name in ("rope_scaling", "rope_parameters"):  # null
        found.pop(name, None)
    used = found.pop("use_sliding_window", None)
    default = DEFAULTS.get(model_type, {}).get("use_sliding_window")
    if "sliding_window" in found and (used.value if used else default) is False:
        window = found["sliding_window"]
        found["sliding_window"] = replace(used, value=None) if used else replace(window, value=None)
    activation = found.get("hidden_act")
    if model_type == "gemma" and activation is not None and activation.value == "gelu":
        found["hidden_act"] = replace(activation, value="gelu_new")  # as its first configs had it, and none computed


def _is_of_kind(name: str, value: Any) -> bool:
    """Whether a value is of the kind that a key of such a name has: heads are counted, biases are there or not."""
    if value is None:
        return True
    if HEADS.search(name):
        return isinstance(value, (int, list)) and not isinstance(value, bool)
    return isinstance(value, bool) if name.endswith("bias") else True


def normal(name: str, value: Any) -> Any:
    """A value of a key of this name in the form in which it is compared."""
    if TOKEN_ID.search(name):
        ids = value if isinstance(value, list) else [value]
        return tuple(sorted({float(each) for each in ids if isinstance(each, (int, float))})) or None
    if isinstance(value, str) and ACTIVATION.search(name):
        return _SAME_ACTIVATIONS.get(value.lower(), value.lower())
    if isinstance(value, list):
        return tuple(normal("", item) for item in value)
    if isinstance(value, Mapping):  # in a list; {"__float__": "Infinity"} is transformers 5's infinity
        infinite = value.get("__float__") in ("Infinity", "-Infinity")
        return (
            float(value["__float__"]) if infinite else tuple(sorted((str(k), normal("", v)) for k, v in value.items()))
        )
    return value
