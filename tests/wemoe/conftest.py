"""Tiny transformers of random weights and experts fine-tuned from them; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Tiny = tuple[nn.Module, dict[str, Any], list[dict[str, Tensor]]]

_TEXT = {"vocab_size": 32, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}


def _model(name: str) -> nn.Module:
    import transformers as t

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **_TEXT)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**small, vocab_size=32)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**small, image_size=8, patch_size=4)),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**small, image_size=8, patch_size=4)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**small, **_TEXT, num_key_value_heads=1)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**small, **_TEXT, num_key_value_heads=1)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, **_TEXT)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, feed_forward_proj="gated-gelu",
                decoder_start_token_id=0, **_TEXT,
            )
        ),
    }  # fmt: skip
    return made[name]().eval()


@pytest.fixture
def tiny() -> Callable[[str], Tiny]:
    """name -> (model, arguments of a batch of 3, state dicts of 3 experts)."""

    def make(name: str) -> Tiny:
        torch.manual_seed(0)
        model = _model(name)
        with torch.no_grad():  # biases and norms of a new model are 0 and 1
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tokens = torch.randint(3, 32, (3, 7))
        inputs: dict[str, Any] = {"input_ids": tokens}
        if name in ("vit", "clip"):
            inputs = {"pixel_values": torch.randn(3, 3, 8, 8)}
        if name == "t5":
            inputs["decoder_input_ids"] = tokens[:, :3].clone()
        experts = []
        for _ in range(3):
            moves: dict[int, Tensor] = {}  # tied tensors move together
            expert = {}
            for key, value in model.state_dict().items():
                move = moves.setdefault(value.data_ptr(), 0.05 * torch.randn(value.shape))
                expert[key] = value + move if value.is_floating_point() else value
            experts.append(expert)
        return model, inputs, experts

    return make


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """One thread in all of these tests."""
