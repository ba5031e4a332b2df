"""Tiny models of transformers, fine-tuned and saved: what live merges are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import pymerge

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_EXPERTS = {"num_key_value_heads": 2, **_SIZES, **_TOKENS}


def _llama(transformers: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **_TOKENS, tie_word_embeddings=True))


def _gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, **_TOKENS)
    return transformers.GPT2LMHeadModel(config)


def _bert(transformers: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, pad_token_id=0))


def _t5(transformers: Any) -> Any:
    config = transformers.T5Config(
        d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _mixtral(transformers: Any) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_EXPERTS, num_local_experts=4))


def _qwen3_moe(transformers: Any) -> Any:
    config = transformers.Qwen3MoeConfig(**_EXPERTS, moe_intermediate_size=8, num_experts=4, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


FAMILIES: dict[str, Callable[[Any], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}


def trained(transformers: Any, family: str, experts: int = 2) -> list[Any]:
    """A model and its fine-tunes, all in evaluation mode."""
    torch.manual_seed(0)
    base = FAMILIES[family](transformers).eval()
    models = [base]
    for _ in range(experts):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        models.append(model)
    return models


def saved(models: Sequence[Any], folder: Path) -> list[Path]:
    """Folders of the models, as save_pretrained writes them."""
    paths = [folder / ("base" if number == 0 else f"expert{number}") for number in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    return paths


def merged_files(paths: Sequence[Path], out: Path, method: str, parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a merge of files, by `pymerge.merge`; parameters with a list have a value for each model."""
    each = {name: value for name, value in parameters.items() if isinstance(value, list)}
    config = {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": [
            {"model": str(path), "parameters": {name: values[number] for name, values in each.items()}}
            for number, path in enumerate(paths[1:])
        ],
        "parameters": {name: value for name, value in parameters.items() if name not in each},
    }
    pymerge.merge(config, out, device="cpu", progress=False)
    return load_file(out / "model.safetensors")
