"""Values that keys of config.json have where it leaves them out: those of transformers, for common types of models.

Keys are as `pymerge.architecture.config_facts` means them. None of num_key_value_heads stands for as many as there are
heads, None of head_dim for hidden_size / num_attention_heads. What is not here, or has changed between releases, is
unknown.
"""

from __future__ import annotations

from typing import Any

_ROPE: dict[str, Any] = {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
_LLAMA = {
    **_ROPE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": None,
    "head_dim": None,
}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN = {**_LLAMA, "num_key_value_heads": 32, "use_sliding_window": False}
_GEMMA = {**_LLAMA, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False}
_GPT = {"hidden_act": "gelu_new", "layer_norm_epsilon": 1e-5}
_BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, **_BIASES},
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        **_LLAMA,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_experts_per_tok": 2,
    },
    "qwen2": _QWEN,
    "qwen2_moe": {
        **_QWEN,
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "qkv_bias": True,
    },
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {
        **_QWEN,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "gemma": {**_GEMMA, "head_dim": 256, "num_key_value_heads": 16},
    "gemma2": {
        **_GEMMA,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "granite": {
        **_LLAMA,
        **_BIASES,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "olmo2": {**_LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False},
    "phi": {
        **_ROPE,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "qk_layernorm": False,
    },
    "phi3": {**_LLAMA, "rms_norm_eps": 1e-5, "sliding_window": None},
    "stablelm": {
        **_ROPE,
        "partial_rotary_factor": 0.25,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    "starcoder2": {
        **_ROPE,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "use_bias": True,
    },
    "gpt_neox": {
        **_ROPE,
        "partial_rotary_factor": 0.25,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    "gpt2": {**_GPT, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "gptj": {**_GPT, "rotary_dim": 64},
    "gpt_neo": {**_GPT, "window_size": 256},
    "opt": {"hidden_act": "relu"},
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": {"hidden_act": "gelu"},
    "vit": {**_BERT, "qkv_bias": True},
    "t5": {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "d_kv": 64},
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip_text_model": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
