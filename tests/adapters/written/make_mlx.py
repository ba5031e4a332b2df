"""Writes mlx: bases, adapters as mlx-lm saves them, and what its `fuse` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).parent / "mlx"
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 8,
}
PARAMETERS = {"rank": 3, "dropout": 0.0, "scale": 2.5}


def write_bases() -> None:
    torch.manual_seed(0)
    llama = LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True)
    LlamaForCausalLM(llama).save_pretrained(HERE / "llama")
    mixtral = MixtralConfig(
        **SIZES, intermediate_size=12, num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=False
    )
    MixtralForCausalLM(mixtral).save_pretrained(HERE / "mixtral")
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).save_pretrained(HERE / "gpt2")
    config = HERE / "gpt2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_ctx": 8}))
    for leftover in HERE.glob("*/generation_config.json"):
        leftover.unlink()


def write(base: str, name: str, kind: str, **parameters: Any) -> None:
    said = {**PARAMETERS, **parameters}
    model, _ = load_model(HERE / base)
    mx.random.seed(1)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), said, use_dora=kind == "dora")
    trained = [(key, value + 0.1 * mx.random.normal(value.shape)) for key, value in leaves(model)]
    model.update(tree_unflatten(trained))
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    config = {"model": base, "fine_tune_type": kind, "num_layers": len(model.layers), "lora_parameters": said}
    save_config(config, folder / "adapter_config.json")
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))

    plain, _ = load_model(HERE / base)
    before = dict(tree_flatten(plain.parameters()))
    fused = load_adapters(plain, str(folder))
    fused.update_modules(
        tree_unflatten([(path, module.fuse()) for path, module in fused.named_modules() if hasattr(module, "fuse")])
    )
    after = dict(tree_flatten(fused.parameters()))
    changed = {key: value for key, value in after.items() if not mx.array_equal(value, before[key])}
    mx.save_safetensors(str(HERE / f"{name}.fused.safetensors"), changed)


def leaves(model: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.trainable_parameters())


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    write_bases()
    write("llama", "llama-lora", "lora")
    write("llama", "llama-lora-embedding", "lora", keys=["model.embed_tokens", "self_attn.q_proj"])
    write("llama", "llama-dora", "dora", keys=["model.embed_tokens", "self_attn.q_proj", "mlp.up_proj"])
    write("gpt2", "gpt2-lora", "lora")
    write("gpt2", "gpt2-dora", "dora")
    write("mixtral", "mixtral-lora", "lora")
