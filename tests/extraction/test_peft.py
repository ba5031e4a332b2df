"""Extracted adapters as PEFT loads and merges them, on tiny models that transformers makes and saves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pymerge

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK = 2


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, **more
    )
    return made(transformers.LlamaForCausalLM, config)


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    return made(transformers.Qwen2ForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return made(transformers.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return made(transformers.BertForMaskedLM, config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    return made(transformers.T5ForConditionalGeneration, config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return made(transformers.ViTForImageClassification, config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=3,
    )  # fmt: skip
    return made(transformers.MixtralForCausalLM, config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=3, head_dim=8,
    )  # fmt: skip
    return made(transformers.GptOssForCausalLM, config)


def made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config)
    return model.eval()


def low_rank(name: str, weight: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    """A difference of this rank for matrices, stacks and kernels; none for vectors."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shape = weight.shape if weight.ndim == 3 and "expert" in name else (weight.shape[0], weight[0].numel())
    left = torch.randn(*shape[:-1], rank, generator=generator)
    return 0.05 * (left @ torch.randn(*shape[:-2], rank, shape[-1], generator=generator)).reshape(weight.shape)


def anything(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A difference of low rank for matrices, and any for vectors."""
    if weight.ndim < 2:
        return 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    return low_rank(name, weight)


Change = Callable[[str, torch.Tensor], torch.Tensor]


def saved(make: Callable[[], nn.Module], change: Change, folder: Path) -> tuple[Path, Path, nn.Module]:
    """Folders of the base and of what is fine-tuned from it, and the latter in memory."""
    model: Any = make()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += change(name, parameter)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", model


def merged(base: Path, adapter: Path, kind: type[Any]) -> nn.Module:
    """The base with the adapter, by PEFT, which finds a key for everything and a use for every key."""
    loaded = kind.from_pretrained(base)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(loaded, adapter)
    said = [str(each.message) for each in found]
    assert not [text for text in said if "missing" in text or "unexpected" in text]
    result: nn.Module = model.merge_and_unload()
    return result


def agree(one: nn.Module, other: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Compare the parameters of these names; how many there are."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if wanted(name)]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    return len(names)


# Words in the names of matrices that get no factors without being asked for: tables, heads, routers.
_TABLES = ("embed", "lm_head")
LEFT_OUT: dict[Callable[[], nn.Module], tuple[str, ...]] = {
    llama: _TABLES,
    qwen2: _TABLES,
    gpt2: ("wte", "wpe"),
    bert: ("embeddings", "cls"),
    t5: ("shared", "embed", "lm_head", "relative_attention_bias"),
    vit: ("cls_token", "position_embeddings", "classifier"),
    mixtral: (*_TABLES, "gate.weight"),
    gpt_oss: (*_TABLES, "router", "gate_up_proj_bias", "down_proj_bias"),
}


@pytest.mark.parametrize("make", LEFT_OUT, ids=lambda make: make.__name__)
def test_what_is_extracted_at_full_rank_is_what_was_learnt(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight) if any(word in name for word in LEFT_OUT[make]) else low_rank(name, weight)

    base, tuned, model = saved(make, change, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, progress=False)
    assert report.error < 1e-5
    assert agree(merged(base, tmp_path / "out", type(model)), model) > 10
