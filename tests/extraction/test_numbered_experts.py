"""Adapters out of models whose files have experts one by one: what PEFT makes of them, or that they are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import pymerge
from pymerge.extraction.names import stacked_words
from tests.extraction.test_peft import RANK, agree, low_rank, made, merged, saved

pytest.importorskip("peft")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "moe_intermediate_size": 8,
}


def deepseek() -> nn.Module:
    """Dense blocks and shared experts have modules with the words of the experts' matrices."""
    config = transformers.DeepseekV3Config(
        **SIZES, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, v_head_dim=8,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    return made(transformers.DeepseekV3ForCausalLM, config)


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_hidden_layers=1, num_experts=3, shared_expert_intermediate_size=12
    )
    return made(transformers.Qwen2MoeForCausalLM, config)


def learnt(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A difference of low rank for all that gets factors unasked."""
    skipped = any(word in name for word in ("embed", "lm_head", ".gate.weight"))
    return torch.zeros_like(weight) if skipped else low_rank(name, weight)


def test_modules_with_the_words_of_experts(tmp_path: Path) -> None:
    """PEFT takes them for experts, and would adapt none of them."""
    base, tuned, model = saved(deepseek, learnt, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, progress=False)
    assert report.error < 1e-5
    assert agree(merged(base, tmp_path / "out", type(model)), model) > 20


def test_experts_that_peft_would_ignore(tmp_path: Path) -> None:
    """transformers stacks Qwen2-MoE's experts, and PEFT no factors of single ones: they are left out, and named."""
    base, tuned, model = saved(qwen2_moe, learnt, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, progress=False)
    left = {each.name for each in report.tensors if each.place == "nowhere" and ".experts." in each.name}
    assert len(left) == 9
    assert not any(".experts." in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert agree(merged(base, tmp_path / "out", type(model)), model, lambda name: ".experts." not in name) > 10


def test_models_whose_experts_peft_stacks() -> None:
    """The list of their types is that of the PEFT and transformers that are installed."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for kind, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        words = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
        if kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
            assert set(stacked_words({"model_type": kind})) == set(words), kind
