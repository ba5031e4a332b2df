"""Codes in place of weights are found by structure, and the integers of ordinary models are left in peace."""

from __future__ import annotations

import pytest

from pymerge.checkpoint.codes import find_codes
from pymerge.checkpoint.quantised import quantised

Shapes = dict[str, tuple[str, tuple[int, ...]]]

# What else lies in the file: nothing here is a scale of anything.
REST: Shapes = {
    "model.embed_tokens.weight": ("BF16", (40, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.0.self_attn.q_proj.bias": ("BF16", (8,)),
    "model.layers.0.input_layernorm.weight": ("F32", (8,)),
}

CODES: dict[str, tuple[Shapes, str]] = {
    # ComfyUI, DeepSeek and others: an 8-bit weight, and its scale under some name.
    "fp8 scale_weight": ({"a.weight": ("F8_E4M3", (8, 4)), "a.scale_weight": ("F32", ())}, "scaled FP8"),
    "fp8 weight_scale": ({"a.weight": ("F8_E4M3", (8, 4)), "a.weight_scale": ("F32", (1,))}, "scaled FP8"),
    "fp8 scale": ({"a.weight": ("F8_E4M3", (8, 4)), "a.scale": ("F32", (1, 1))}, "scaled FP8"),
    "fp8 weight.scale": ({"a.weight": ("F8_E4M3", (8, 4)), "a.weight.scale": ("BF16", (8, 1))}, "scaled FP8"),
    "fp8 input_scale": ({"a.weight": ("F8_E5M2", (8, 4)), "a.input_scale": ("F32", ())}, "scaled FP8"),
    "fp8 blocks": ({"a.weight": ("F8_E4M3", (256, 256)), "a.weight_scale_inv": ("F32", (2, 2))}, "scaled FP8"),
    "fp8 U8 scale": ({"a.weight": ("F8_E4M3", (8, 64)), "a.weight_scale": ("U8", (8, 2))}, "scaled FP8"),
    "fp8 unheard of": ({"a.weight": ("F8_E4M3", (8, 4)), "a.multiplier": ("F32", (8,))}, "scaled FP8"),
    "fp8 columns": ({"a.weight": ("F8_E4M3", (8, 4)), "a.smooth": ("F16", (1, 4))}, "scaled FP8"),
    "fp8 prefix": ({"model.a.weight": ("F8_E4M3", (8, 4)), "scales.model.a.weight": ("F32", ())}, "scaled FP8"),
    "fp8 prefix of a module": ({"a.weight": ("F8_E4M3", (8, 4)), "scales.a": ("F32", (1,))}, "scaled FP8"),
    "fp8 named after": ({"a.w1": ("F8_E4M3", (8, 4)), "a.w1_s": ("F32", (8, 1))}, "scaled FP8"),
    "fp8 beside the module": ({"l.q_proj.weight": ("F8_E4M3", (8, 4)), "l.q_proj_scale": ("F32", ())}, "scaled FP8"),
    "fp8 experts": (
        {"experts.gate_up_proj": ("F8_E4M3", (2, 8, 4)), "experts.gate_up_proj_scale": ("F32", (2, 1, 8))},
        "scaled FP8",
    ),
    # Integers, with scales and without.
    "mlx": (
        {"a.weight": ("U32", (8, 8)), "a.scales": ("BF16", (8, 2)), "a.biases": ("BF16", (8, 2))},
        "MLX",
    ),
    "mlx mxfp4": ({"a.weight": ("U32", (8, 8)), "a.scales": ("U8", (8, 2))}, "MLX"),
    "nvfp4": (
        {"a.weight": ("U8", (8, 8)), "a.weight_scale": ("F8_E4M3", (8, 1)), "a.weight_scale_2": ("F32", ())},
        "NVFP4",
    ),
    "quanto": ({"a.weight._data": ("I8", (8, 8)), "a.weight._scale": ("BF16", (8, 1))}, "quanto"),
    "hqq": ({"a.W_q": ("U8", (8, 8)), "a.scale": ("F16", (8, 1)), "a.zero": ("F16", (8, 1))}, "HQQ"),
    "gptq marlin": ({"a.qweight": ("I32", (8, 8)), "a.scales": ("F16", (1, 8))}, "GPTQ"),
    "awq": ({"a.qweight": ("I32", (8, 1)), "a.qzeros": ("I32", (1, 1)), "a.scales": ("F16", (1, 8))}, "AWQ"),
    "eetq": ({"a.weight": ("I8", (8, 8)), "a.weight_scales": ("F16", (8,))}, "EETQ"),
    "bitnet": ({"a.weight": ("U8", (2, 8)), "a.weight_scale": ("BF16", (1,))}, "BitNet"),
    "exl2": ({"a.q_weight": ("I32", (8, 8)), "a.q_scale": ("I32", (1, 1)), "a.q_scale_max": ("F16", (1,))}, "EXL2"),
    "exl3": ({"a.trellis": ("I16", (1, 1, 64)), "a.suh": ("F16", (8,)), "a.svh": ("F16", (8,))}, "EXL3"),
    "aqlm": (
        {"a.codes": ("I8", (8, 1, 2)), "a.codebooks": ("F16", (2, 256, 1, 8)), "a.scales": ("F16", (8, 1, 1, 1))},
        "AQLM",
    ),
    "torchao": ({"a._weight_qdata": ("I8", (8, 8)), "a._weight_scale": ("BF16", (8,))}, "torchao"),
    "comfy_quant": ({"a.weight": ("F8_E4M3", (8, 4)), "a.comfy_quant": ("U8", (30,))}, "ComfyUI"),
    "int8 scale": ({"a.weight": ("I8", (8, 8)), "a.scale": ("F32", ())}, "scaled int8"),
    "int8 alone": ({"a.weight": ("I8", (8, 8))}, "integer codes"),
    "int64 weight": ({"a.weight": ("I64", (8, 8))}, "integer codes"),
    "bool weight": ({"a.weight": ("BOOL", (8, 8))}, "integer codes"),
    "a flat list": ({"a.codes": ("U8", (32,)), "a.absmax_scale": ("F32", (4,))}, "integer codes"),
    "int4 under a name of its own": ({"a.int4": ("U8", (8, 4)), "a.int4_scale": ("F16", (8, 1))}, "integer codes"),
    "bfloat16 as U16": (
        {"a.weight": ("U16", (8, 8)), "n.weight": ("U16", (8,))},
        "bfloat16 or float16 weights stored as U16",
    ),
    "bfloat16 as I16": ({"a.kernel": ("I16", (8, 8))}, "bfloat16 or float16 weights stored as I16"),
}


@pytest.mark.parametrize("case", CODES)
def test_codes_are_found_and_named(case: str) -> None:
    tensors, kind = CODES[case]
    found = quantised(REST | tensors)
    assert found is not None
    name, said = found
    assert name in tensors
    assert kind in said
    assert f"by tensor '{name}'" in said
    assert "; merge the original weights instead" in said or "in tensor.view(torch.bfloat16)" in said
    assert quantised(dict(reversed((REST | tensors).items()))) is not None


ORDINARY: dict[str, Shapes] = {
    "BERT, CLIP": {
        "bert.embeddings.position_ids": ("I64", (1, 512)),
        "vision_model.embeddings.position_ids": ("I64", (1, 50)),
        "vision_model.embeddings.class_embedding": ("F32", (50,)),
        "logit_scale": ("F32", ()),
    },
    "GPT-2, GPT-Neo, GPT-J": {
        "h.0.attn.bias": ("U8", (1, 1, 16, 16)),
        "h.0.attn.masked_bias": ("F32", ()),
        "h.1.attn.bias": ("BOOL", (1, 1, 16, 16)),
        "h.1.attn.masked_bias": ("F16", ()),
        "h.2.attn.causal_mask": ("U8", (1, 1, 16, 16)),
        "h.2.attn.scale_attn": ("F32", ()),
        "h.3.attn.causal": ("BOOL", (16, 16)),
        "h.3.attn.scale": ("F32", ()),
    },
    "Swin, BEiT": {
        "layers.0.attn.relative_position_bias_table": ("F32", (169, 3)),
        "layers.0.attn.relative_position_index": ("I64", (49, 49)),
        "layers.0.attn.logit_scale": ("F32", (3, 1, 1)),
        "layers.0.attn.relative_coords_table": ("F32", (1, 13, 13, 2)),
        "layers.1.attn.relative_position_index": ("I64", (1, 1)),
        "layers.1.attn.logit_scale": ("F32", (1, 1, 1)),
        "layers.1.attn.attention_bias_idxs": ("I64", (16, 16)),
    },
    "ResNet": {
        "bn1.weight": ("F32", (8,)),
        "bn1.running_mean": ("F32", (8,)),
        "bn1.running_var": ("F32", (8,)),
        "bn1.num_batches_tracked": ("I64", ()),
    },
    "quantisation-aware training": {
        "conv.weight": ("F32", (8, 4, 3, 3)),
        "conv.weight_fake_quant.scale": ("F32", (8,)),
        "conv.weight_fake_quant.zero_point": ("I32", (8,)),
        "conv.weight_fake_quant.fake_quant_enabled": ("U8", (1,)),
        "conv.weight_fake_quant.observer_enabled": ("U8", (1,)),
    },
    "maps of tokens and experts": {
        "layers.0.mlp.gate.tid2eid": ("I64", (40, 2)),
        "layers.0.mlp.gate.weight": ("BF16", (4, 8)),
        "layers.0.mlp.gate.e_score_correction_bias": ("F32", (4,)),
        "d2t": ("I64", (20,)),
        "t2d": ("BOOL", (40,)),
        "group_idx": ("I64", (21, 14)),
        "token_to_id": ("I32", (40, 3)),
        "expert_map": ("I32", (2, 4)),
    },
    "8-bit floats without scales": {
        "a.weight": ("F8_E4M3", (8, 4)),
        "a.bias": ("BF16", (8,)),
        "n.weight": ("F8_E4M3", (8,)),
        "n.bias": ("BF16", (8,)),
        "scale": ("F32", ()),
        "text_projection": ("F8_E4M3", (8, 8)),
        "logit_scale": ("F32", ()),
        "layers.0.gate.weight": ("F8_E4M3", (4, 8)),
        "layers.0.gate.e_score_correction_bias": ("F32", (4,)),
        "layers.0.gamma_1": ("F32", (8,)),
        "layers.0.attn_scale": ("F32", (8,)),
        "layers.0.layer_scale": ("F32", (8,)),
        "layers.0.attn.q.weight": ("F8_E4M3", (8, 8)),
        "hc_fn": ("F8_E4M3", (8, 4)),
        "hc_scale": ("F32", ()),
        "embed_tokens.weight": ("F8_E4M3", (40, 8)),
        "embed_tokens.embed_scale": ("F32", ()),
        "embeddings.position_embeddings": ("F8_E4M3", (1, 50, 8)),
        "embeddings.cls_token": ("BF16", (1, 1, 8)),
        "mixer.A_log": ("F8_E4M3", (8, 4)),
        "mixer.D": ("F32", (8,)),
        "conv.weight_v": ("F8_E4M3", (8, 4)),
        "conv.weight_g": ("F32", (8, 1)),
        "experts.gate_up_proj": ("F8_E4M3", (2, 8, 4)),
        "experts.gate_up_proj_bias": ("BF16", (2, 8)),
    },
    "scales of plain weights": {
        "a.scales": ("F16", (4,)),
        "k_proj.k_scale": ("F32", ()),
        "b.weight_scale": ("F32", (8,)),
        "b.weight": ("BF16", (8, 8)),
        "image_blocks": ("F16", (4,)),
    },
}  # fmt: skip


@pytest.mark.parametrize("model", ORDINARY)
def test_ordinary_models_are_not_refused(model: str) -> None:
    assert list(find_codes(REST | ORDINARY[model])) == []
    assert quantised(REST | ORDINARY[model]) is None
