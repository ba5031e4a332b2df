"""Configs that say different things about weights, and those that only say the same differently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pymerge.architecture.config_defaults import DEFAULTS
from pymerge.architecture.config_facts import facts
from pymerge.architecture.configs import differences

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def found(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any, bool]]:
    """Keys as both spell them -> both values, and whether that breaks a merge."""
    return {
        f"{each.ours.key}|{each.theirs.key}": (each.ours.shown, each.theirs.shown, each.breaks)
        for each in differences(ours, theirs)
    }


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("rope_theta", 1e4, 1e6),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("layer_norm_epsilon", 1e-5, 1e-12),
        ("max_position_embeddings", 4096, 8192),
        ("sliding_window", None, 4096),
        ("eos_token_id", 2, [2, 3]),
        ("pad_token_id", 0, 1),
        ("decoder_start_token_id", 0, 2),
        ("final_logit_softcapping", 30.0, None),
        ("partial_rotary_factor", 0.5, 0.25),
        ("embedding_multiplier", 12.0, 1.0),
        ("logits_scaling", 8.0, 16.0),
        ("scale_embedding", True, False),
        ("attention_bias", True, False),
        ("num_experts_per_tok", 2, 4),
        ("norm_topk_prob", True, False),
        ("routed_scaling_factor", 1.0, 2.5),
        ("layer_types", ["full_attention"] * 2, ["full_attention", "sliding_attention"]),
        ("query_pre_attn_scalar", 256, 224),
        ("alibi", True, False),
        ("use_parallel_residual", True, False),
        ("position_embedding_type", "absolute", "relative_key"),
        ("scoring_func", "softmax", "sigmoid"),
        ("model_type", "llama", "mistral"),
    ],
)
def test_what_changes_the_meaning_of_weights(key: str, ours: Any, theirs: Any) -> None:
    assert found(LLAMA | {key: ours}, LLAMA | {key: theirs}) == {f"{key}|{key}": (ours, theirs, False)}


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 4, 2),
        ("head_dim", 16, 32),
        ("qk_rope_head_dim", 64, 32),
        ("encoder_attention_heads", 8, 16),
        ("d_kv", 64, 32),
        ("hidden_act", "silu", "gelu"),
        ("hidden_act", "gelu", "gelu_new"),
        ("activation_function", "relu", "gelu_new"),
        ("feed_forward_proj", "gated-gelu", "relu"),
    ],
)
def test_what_no_weights_are_right_for(key: str, ours: Any, theirs: Any) -> None:
    assert found({"model_type": "x", key: ours}, {"model_type": "x", key: theirs}) == {
        f"{key}|{key}": (ours, theirs, True)
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_theta": 10000}, {"rope_theta": 1e4}),
        ({"rope_theta": None}, {"rope_theta": 10000.0}),  # the default of llama
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 9.999999747378752e-06}),  # has been float32
        ({"eos_token_id": 2}, {"eos_token_id": [2]}),
        ({"eos_token_id": [3, 2]}, {"eos_token_id": [2, 3]}),
        ({"pad_token_id": None}, {"pad_token_id": 0}),
        ({"rope_scaling": None}, {"rope_scaling": {"type": "default"}}),
        ({"rope_theta": 1e6}, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        (
            {"rope_theta": 1e6, "rope_scaling": YARN},
            {"rope_theta": None, "rope_parameters": YARN | {"rope_theta": 1e6, "beta_fast": 32, "beta_slow": 1.0}},
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}, "original_max_position_embeddings": 4096},
            {"rope_scaling": {"rope_type": "longrope", "factor": 2, "original_max_position_embeddings": 4096}},
        ),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": None}, {"head_dim": 16}),
        ({"time_step_limit": [0.0, float("inf")]}, {"time_step_limit": [0, {"__float__": "Infinity"}]}),
        ({"image_size": 224}, {"image_size": [224, 224]}),
        ({"num_attention_heads": 4}, {"num_attention_heads": [4, 4], "head_dim": 16}),
        ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ({"attention_bias": None}, {"attention_bias": False}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),  # said when tensors are matched
        (
            {"_name_or_path": "a", "transformers_version": "4.40", "torch_dtype": "float16", "use_cache": True},
            {"_name_or_path": "b", "transformers_version": "5.0", "dtype": "bfloat16", "use_cache": False},
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "initializer_range": 0.02},
            {"architectures": ["LlamaForSequenceClassification"], "attention_dropout": 0.1, "initializer_range": 0.01},
        ),
        (
            {"id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": None, "classifier_dropout": 0.1},
            {"id2label": {"0": "b", "1": "c"}, "label2id": {"b": 0, "c": 1}, "classifier_dropout": None},
        ),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.1}, {"router_aux_loss_coef": 0.02}),
        ({"logit_scale_init_value": 2.6592}, {"logit_scale_init_value": 2.0}),
        ({"unheard_of": 1, "rope_unheard_of": 2}, {"unheard_of": 2}),
        ({"max_window_layers": 28}, {"max_window_layers": 21}),
    ],
)
def test_what_says_the_same_or_nothing(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    one, two = LLAMA | ours, LLAMA | theirs
    for each in (one, two):
        for key in [key for key, value in each.items() if value is None and key not in ("rope_scaling",)]:
            assert found({**each, key: None}, {name: value for name, value in each.items() if name != key}) == {}
    assert found(one, two) == {}
    assert found(two, one) == {}


def test_a_language_model_inside_another() -> None:
    inside = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}}
    assert found(inside, LLAMA) == {}
    assert found(inside, LLAMA | {"rope_theta": 1e4}) == {"text_config.rope_theta|rope_theta": (500000.0, 1e4, False)}
    five = {key: value for key, value in LLAMA.items() if key != "rope_theta"} | {
        "rope_parameters": {"rope_theta": 1e6}
    }
    assert found(inside, {**inside, "text_config": five}) == {
        "text_config.rope_theta|text_config.rope_parameters.rope_theta": (500000.0, 1e6, False)
    }
    other = {**inside, "vision_config": {"model_type": "clip_vision_model", "hidden_act": "gelu"}}
    assert found(inside, other) == {"vision_config.hidden_act|vision_config.hidden_act": ("quick_gelu", "gelu", True)}
    other["vision_config"] = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    assert found(inside, other) == {}


def test_scaled_positions_are_compared_by_what_they_say() -> None:
    assert found(LLAMA, LLAMA | {"rope_scaling": YARN}) == {
        "rope_scaling.rope_type|rope_scaling.rope_type": ("default", "yarn", False)
    }
    bare = {"num_attention_heads": 4}
    for said in (bare, bare | {"rope_scaling": None}):
        assert list(found(said, bare | {"rope_parameters": YARN}).values()) == [("default", "yarn", False)]
    assert found({"model_type": "gpt_oss"}, {"model_type": "gpt_oss", "rope_scaling": YARN}) == {}
    assert found(bare, bare | {"vision_config": {"rope_scaling": YARN}}) == {}
    other = {"rope_parameters": YARN | {"factor": 8, "rope_theta": 500000}}
    assert found(LLAMA | {"rope_scaling": YARN}, LLAMA | other) == {
        "rope_scaling.factor|rope_parameters.factor": (4.0, 8, False)
    }
    gemma = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    layered = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert found(gemma, {"model_type": "gemma3_text", "rope_parameters": layered}) == {}
    layered["sliding_attention"] = {"rope_theta": 2e4}
    assert found(gemma, {"model_type": "gemma3_text", "rope_parameters": layered}) == {
        "rope_local_base_freq|rope_parameters.sliding_attention.rope_theta": (1e4, 2e4, False)
    }


def test_windows_that_are_not_used() -> None:
    qwen = {"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 64}
    unused = qwen | {"use_sliding_window": False, "sliding_window": 131072}
    assert found(unused, qwen | {"use_sliding_window": False, "sliding_window": 32768}) == {}
    assert found(unused, qwen | {"sliding_window": None}) == {}
    assert found(qwen | {"sliding_window": 4096}, unused) == {}  # not used by default
    assert found(unused, qwen | {"use_sliding_window": True, "sliding_window": 4096}) == {
        "use_sliding_window|sliding_window": (False, 4096, False)
    }


def test_defaults_count_only_where_they_are_known() -> None:
    mistral = {"model_type": "mistral", "num_attention_heads": 32, "hidden_size": 4096}
    assert found(mistral, mistral | {"sliding_window": 4096, "num_key_value_heads": 8}) == {}
    assert found(mistral, mistral | {"sliding_window": None}) == {"sliding_window|sliding_window": (4096, None, False)}
    assert found({"model_type": "x"}, {"model_type": "x", "rope_theta": 1e6, "hidden_act": "relu"}) == {}
    first = {"model_type": "gemma", "hidden_act": "gelu"}  # which the model has never computed
    assert found(first, {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}) == {}
    newer = {"model_type": "gemma2", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    assert found(newer, {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}) == {}


def test_lists_for_each_layer_do_not_count_for_slices() -> None:
    one, two = ({"layer_types": [kind], "rope_theta": theta} for kind, theta in (("a", 1.0), ("b", 2.0)))
    assert [each.meaning for each in differences(one, two, per_layer=False)] == ["rope_theta"]


@pytest.mark.parametrize("model_type", [name for name in DEFAULTS if "_model" not in name])
def test_the_defaults_are_those_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    said = facts(config.to_dict())
    for key, value in DEFAULTS[model_type].items():
        if key in ("use_sliding_window", "partial_rotary_factor") or value is None:
            continue
        name = said.get(key)
        assert name is not None, key
        shown = name.value if isinstance(name.value, str) else name.shown
        assert shown == (facts({key: value})[key].value if isinstance(value, str) else value), key


PUBLISHED: list[dict[str, Any]] = [  # by transformers 4, in the form of well-known models
    {
        **{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "eos_token_id": [1, 2],
            "mlp_bias": False,
        },
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    },
    {
        **{"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "rope_theta": 1e6},
    },
    {
        **{"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144},
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "longrope"},
    },
    {
        **{"model_type": "gemma3_text", "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4},
        **{"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window_pattern": 6},
    },
    {
        **{"model_type": "qwen2_vl", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "image_token_id": 9},
        "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2},
    },
    {
        **{"model_type": "llava", "image_token_index": 99, "projector_hidden_act": "gelu", "vision_feature_layer": -2},
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2},
    },
    {
        "model_type": "gpt_neox",
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "num_attention_heads": 8,
        "hidden_act": "gelu",
    },
    {"model_type": "modernbert", "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "norm_eps": 1e-05},
    {"model_type": "mamba2", "num_heads": 128, "time_step_limit": [0.0, float("inf")], "residual_in_fp32": True},
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["model_type"])
def test_a_config_that_is_saved_again_says_the_same(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    assert found(config, json.loads(loaded.to_json_string(use_diff=True))) == {}
