"""Roles of tensors by name, shape and config.json: every tensor of real architectures, and rules that override."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from pymerge.architecture.roles import Kind, Role, Rule, classify, positions, unused_rules
from pymerge.errors import PlanError

Shapes = dict[str, tuple[str, tuple[int, ...]]]

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 40}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
EXPERTS = {**DECODER, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
VISION = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 100, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
TWO_TOWERS = {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 24}
WHISPER = {
    **{"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
    **{"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0},
}

# Model class, configuration, and the linear weights (as regular expressions) that belong to a head.
MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("GPT2LMHeadModel", GPT, "lm_head"),
    ("GPT2ForSequenceClassification", {**GPT, "add_cross_attention": True}, "score"),
    ("OpenAIGPTLMHeadModel", GPT, "lm_head"),
    ("GPTNeoXForCausalLM", ENCODER, "lm_head|embed_out"),
    ("LlamaForCausalLM", DECODER, "lm_head"),
    ("Qwen2ForCausalLM", DECODER, "lm_head"),
    ("Gemma3ForCausalLM", DECODER, "lm_head"),
    ("Phi3ForCausalLM", DECODER, "lm_head"),
    ("BloomForCausalLM", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "lm_head"),
    ("OPTForCausalLM", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 16}, "lm_head"),
    ("MixtralForCausalLM", EXPERTS, "lm_head"),
    ("Qwen3MoeForCausalLM", EXPERTS, "lm_head"),
    ("GptOssForCausalLM", EXPERTS, "lm_head"),
    ("GraniteMoeForCausalLM", EXPERTS, "lm_head"),
    ("DeepseekV3ForCausalLM", {**EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1}, "lm_head"),
    ("MambaForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}, "lm_head"),
    ("BertForPreTraining", ENCODER, r"cls\."),
    ("RobertaForMaskedLM", ENCODER, r"lm_head\."),
    ("RobertaForSequenceClassification", ENCODER, r"classifier\."),
    ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}, r"predictions\.decoder"),
    (
        "DistilBertForQuestionAnswering",
        {"vocab_size": 100, "dim": 32, "hidden_dim": 48, "n_heads": 4},
        "qa_outputs",
    ),
    ("T5ForConditionalGeneration", T5, "lm_head"),
    ("BartForConditionalGeneration", WHISPER, "lm_head"),
    ("WhisperForConditionalGeneration", WHISPER, "proj_out"),
    ("ViTForImageClassification", VISION, "classifier"),
    (
        "SwinForImageClassification",
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
        "classifier",
    ),
    ("CLIPModel", TWO_TOWERS, "$^"),
    ("ClvpModelForConditionalGeneration", {}, "lm_head"),
]


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    codes = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
    return {name: (codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def build(name: str, settings: dict[str, Any]) -> tuple[nn.Module, Shapes, dict[str, Any]]:
    """A model of transformers on the meta device: real names and shapes, no memory."""
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    with torch.device("meta"):
        model = model_class(config)
    return model, shapes_of(model.state_dict()), config.to_dict()


def expected(model: nn.Module, name: str, shape: tuple[int, ...], heads: str) -> tuple[Kind, int, bool]:
    """Kind, in_axis and stacked by the module that owns the tensor."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if len(shape) <= 2 and (parameter == "bias" or parameter.endswith("_bias")):
        return Kind.BIAS, 1, False
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING, 1, False
    if isinstance(module, (nn.Linear, Conv1D)):
        is_head = re.search(heads, name) is not None
        return (Kind.HEAD if is_head else Kind.LINEAR), int(is_head or isinstance(module, nn.Linear)), False
    if "Norm" in type(module).__name__:
        return Kind.NORM, 1, False
    if "Router" in type(module).__name__:
        return Kind.LINEAR, 1, False
    if hasattr(module, "is_transposed") and len(shape) == 3:  # experts of transformers 5
        return Kind.LINEAR, 0 if module.is_transposed else 1, True
    return Kind.OTHER, 1, False


@pytest.mark.parametrize(("name", "settings", "heads"), MODELS, ids=[name for name, _, _ in MODELS])
def test_every_tensor_of_a_real_architecture(name: str, settings: dict[str, Any], heads: str) -> None:
    model, shapes, config = build(name, settings)
    roles = classify(shapes, config)
    assert list(roles) == list(shapes)
    wrong = {}
    for tensor, role in roles.items():
        found = (role.kind, role.in_axis, role.stacked)
        if shapes[tensor][0] == "F32" and found != expected(model, tensor, shapes[tensor][1], heads):
            wrong[tensor] = role.describe()
    assert wrong == {}
    assert all(role.reason for role in roles.values())


def test_reasons_name_the_evidence() -> None:
    _, shapes, config = build("GPT2LMHeadModel", GPT)
    roles = classify(shapes, config)
    block = "transformer.h.1."
    assert roles[block + "attn.c_attn.weight"].describe() == "linear, d_in x d_out (bias of length 96)"
    sibling = roles[block + "attn.c_proj.weight"]
    assert sibling == Role(Kind.LINEAR, 0, False, f"as {block}attn.c_attn.weight", "transformer.h", 1)
    _, shapes, config = build("LlamaForCausalLM", DECODER)
    up = classify(shapes, config)["model.layers.0.mlp.up_proj.weight"]
    assert up.describe() == "linear, d_out x d_in (assumed as in nn.Linear)"
    assert up.solvable
    _, shapes, config = build("Qwen3MoeForCausalLM", EXPERTS)
    experts = classify(shapes, config)["model.layers.0.mlp.experts.down_proj"]
    assert experts.describe() == "stacked linear, E x d_out x d_in (output is the hidden size 32 of config.json)"


@pytest.mark.parametrize(
    ("gate_up", "down", "in_axis"),
    [
        ((4, 64, 32), (4, 32, 32), 1),
        ((4, 32, 64), (4, 32, 32), 0),
        ((4, 32, 32), (4, 32, 16), 1),
        ((4, 32, 32), (4, 16, 32), 0),
    ],
)
def test_square_experts_follow_the_other_matrix(gate_up: tuple[int, ...], down: tuple[int, ...], in_axis: int) -> None:
    shapes: Shapes = {"l.0.experts.gate_up_proj": ("BF16", gate_up), "l.0.experts.down_proj": ("BF16", down)}
    inner = max(gate_up[1:]) // 2
    config = {"text_config": {"hidden_size": 32, "moe_intermediate_size": inner, "num_experts": 4}}
    roles = classify(shapes, {**config, "vision_config": {"hidden_size": inner, "intermediate_size": 32}})
    assert [role.in_axis for role in roles.values()] == [in_axis, in_axis]
    assert all(role.stacked and role.solvable for role in roles.values())


def test_square_gpt_oss_experts_follow_the_biased_one() -> None:
    shapes: Shapes = {
        "l.0.experts.gate_up_proj": ("BF16", (4, 32, 64)),
        "l.0.experts.gate_up_proj_bias": ("BF16", (4, 64)),
        "l.0.experts.down_proj": ("BF16", (4, 32, 32)),
        "l.0.experts.down_proj_bias": ("BF16", (4, 32)),
    }
    roles = classify(shapes, {})
    assert [role.in_axis for role in roles.values() if role.solvable] == [0, 0]
    assert roles["l.0.experts.down_proj"].reason == "as l.0.experts.gate_up_proj"


def test_experts_as_they_are_stored_one_by_one() -> None:
    shapes: Shapes = {
        f"model.layers.{block}.block_sparse_moe.experts.{expert}.{name}.weight": ("BF16", shape)
        for block in range(2)
        for expert in range(4)
        for name, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32)))
    }
    roles = classify(shapes, {"hidden_size": 32, "num_local_experts": 4})
    found = {(role.kind, role.in_axis, role.stacked, role.blocks) for role in roles.values()}
    assert found == {(Kind.LINEAR, 1, False, "model.layers")}
    assert [role.index for role in roles.values()] == [0] * 12 + [1] * 12


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("time_embedding.linear_1.weight", (64, 32), Kind.LINEAR),
        ("vision.patch_embed.proj.weight", (64, 3, 8, 8), Kind.OTHER),
        ("vision.patch_embed.proj.weight", (64, 192), Kind.LINEAR),
        ("vision.patch_embedding.weight", (64, 192), Kind.LINEAR),
        ("electra.embeddings_project.weight", (64, 32), Kind.LINEAR),
        ("encoder.embedding_hidden_mapping_in.weight", (64, 32), Kind.LINEAR),
        ("visual_projection.weight", (64, 32), Kind.LINEAR),
        ("bert.pooler.dense.weight", (32, 32), Kind.LINEAR),
        ("layers.0.attn.in_proj_weight", (96, 32), Kind.LINEAR),
        ("visual.proj", (32, 64), Kind.OTHER),
        ("mm_input_projection_weight", (32, 64), Kind.OTHER),
        ("lstm.weight_hh_l0", (128, 32), Kind.OTHER),
        ("pos_embed", (1, 17, 32), Kind.OTHER),
        ("mixer.conv1d.weight", (64, 1, 4), Kind.OTHER),
        ("logit_scale", (), Kind.OTHER),
        ("layers.0.attn.bias", (1, 1, 40, 40), Kind.OTHER),
        ("layers.0.q_norm.weight", (4, 8), Kind.NORM),
        ("layers.0.norm.gamma", (32,), Kind.NORM),
        ("wte.weight", (100, 32), Kind.EMBEDDING),
        ("backbone.lexicon.weight", (100, 32), Kind.EMBEDDING),
        ("output.weight", (100, 32), Kind.HEAD),
        ("layers.2.shared_head.head.weight", (100, 32), Kind.HEAD),
        ("layers.2.attn.head.weight", (32, 32), Kind.LINEAR),
        ("layers.0.attn.q.weight", (100, 32), Kind.LINEAR),
    ],
)
def test_names(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    shapes: Shapes = {name: ("F16", shape), "layers.0.mlp.up.weight": ("F16", (48, 32))}
    assert classify(shapes, {"text_config": {"vocab_size": 100}})[name].kind is kind


def test_vocabulary_rows_say_nothing_if_the_model_is_as_wide() -> None:
    shapes: Shapes = {"subsampler.dense.weight": ("F32", (100, 32))}
    assert classify(shapes, {"vocab_size": 100})["subsampler.dense.weight"].kind is Kind.EMBEDDING
    assert classify(shapes, {"vocab_size": 100, "d_model": 100})["subsampler.dense.weight"].kind is Kind.LINEAR


def test_a_convolution_with_as_many_channels_as_experts_is_no_stack() -> None:
    shapes: Shapes = {
        "l.0.conv.weight": ("F32", (8, 32, 4)),
        "l.0.moe.input_linear.weight": ("F32", (8, 96, 32)),
    }
    roles = classify(shapes, {"num_experts": 8})
    assert [(role.kind, role.stacked) for role in roles.values()] == [
        (Kind.OTHER, False),
        (Kind.LINEAR, True),
    ]


def test_a_square_weight_follows_the_same_weight_of_other_blocks() -> None:
    shapes: Shapes = {
        "h.0.c.weight": ("F32", (32, 48)),
        "h.0.c.bias": ("F32", (48,)),
        "h.1.c.weight": ("F32", (32, 32)),
        "h.1.c.bias": ("F32", (32,)),
        "h.1.d.weight": ("F32", (32, 32)),
    }
    roles = classify(shapes, {})
    assert roles["h.1.c.weight"].describe() == "linear, d_in x d_out (as h.0.c.weight)"
    assert roles["h.1.d.weight"].describe() == "linear, d_out x d_in (assumed as in nn.Linear)"


def test_a_bias_tells_a_linear_from_an_embedding() -> None:
    shapes: Shapes = {"class_embed.weight": ("F32", (7, 32)), "class_embed.bias": ("F32", (7,))}
    assert classify(shapes, {})["class_embed.weight"].kind is Kind.LINEAR
    assert classify({"class_embed.weight": ("F32", (7, 32))}, {})["class_embed.weight"].kind is Kind.EMBEDDING


def test_integers_and_booleans_are_buffers() -> None:
    for dtype in ("I64", "I32", "U8", "BOOL"):
        assert classify({"layers.0.mlp.weight": (dtype, (4, 4))}, {})["layers.0.mlp.weight"].kind is Kind.BUFFER


def test_the_first_rule_wins_over_all_evidence() -> None:
    shapes: Shapes = {
        "h.0.a.weight": ("F32", (48, 32)),
        "h.0.a.bias": ("F32", (48,)),
        "h.0.b.weight": ("F32", (32, 32)),
        "h.0.c": ("F32", (4, 48, 32)),
    }
    rules = [
        Rule(r"a\.weight$", Kind.LINEAR, in_axis=0),
        Rule("weight$", Kind.OTHER),
        Rule(r"\.c$", Kind.LINEAR),
        Rule("a.weight", Kind.HEAD),
        Rule("nothing", Kind.NORM),
    ]
    roles = classify(shapes, {}, rules)
    assert roles["h.0.a.weight"].describe() == r"linear, d_in x d_out (rule 'a\\.weight$')"
    assert roles["h.0.b.weight"].kind is Kind.OTHER
    assert roles["h.0.c"].stacked
    assert roles["h.0.c"].reason == r"rule '\\.c$', assumed as in nn.Linear"
    assert unused_rules(shapes, rules) == ["a.weight", "nothing"]


def test_rules_that_cannot_be_are_reported_together() -> None:
    shapes: Shapes = {"a": ("F32", (4,)), "b": ("F32", (2, 3)), "c": ("F32", (2, 3, 3, 3))}
    rules = [Rule("b", Kind.LINEAR, stacked=True), Rule(".", Kind.LINEAR)]
    with pytest.raises(PlanError) as caught:
        classify(shapes, {}, rules)
    assert len(caught.value.problems) == 3
    assert "rule 'b' makes 'b' a stacked linear weight, but its shape is (2, 3)" in caught.value.problems[1]


def test_positions_are_mergekits() -> None:
    names = [f"enc.layers.{i}.mlp.up.weight" for i in range(5)]
    names += ["dec.block.0.layer.1.q.weight", "embed.weight", "norm.weight", "head.0.weight", "head.2.weight"]
    roles = classify({name: ("F32", (4, 4)) for name in names}, {})
    assert list(positions(roles, {}).values()) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_extra_prediction_blocks_do_not_stretch_positions() -> None:
    roles = classify({f"model.layers.{i}.mlp.up.weight": ("F32", (4, 4)) for i in range(6)}, {})
    config = {"num_hidden_layers": 5, "num_nextn_predict_layers": 1}
    assert list(positions(roles, config).values()) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert positions(roles, {})["model.layers.5.mlp.up.weight"] == 1.0
    assert positions(roles, {})["model.layers.1.mlp.up.weight"] == 0.2


def test_order_of_tensors_does_not_matter() -> None:
    _, shapes, config = build("GptOssForCausalLM", EXPERTS)
    assert classify(dict(reversed(shapes.items())), config) == classify(shapes, config)


def test_rules_split_weights_in_equal_parts() -> None:
    tensors = {
        "a.qkv.weight": ("F32", (12, 4)),
        "mlp.experts.gate_up_proj": ("F32", (2, 8, 4)),
        "b.weight": ("F32", (4, 4)),
    }
    rules = [Rule("qkv", Kind.LINEAR, split=3), Rule("gate_up", Kind.LINEAR, split=1)]
    found = classify(tensors, {}, rules)
    assert [found[name].parts for name in tensors] == [3, 1, 1]
    assert "3 weights in one" in found["a.qkv.weight"].describe()
    assert classify(tensors, {})["mlp.experts.gate_up_proj"].parts == 2
    with pytest.raises(PlanError, match=r"rule 'qkv' splits 'a\.qkv\.weight' in 5, and it has 12 outputs"):
        classify(tensors, {}, [Rule("qkv", Kind.LINEAR, split=5)])
