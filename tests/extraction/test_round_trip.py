"""Extracted adapters read again by pymerge itself: on the base they give the fine-tuned model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.api import merge
from pymerge.extraction import api
from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model

RANK = 3


def stacks(transposed: bool) -> tuple[Tensors, dict[str, object]]:
    """A Llama with stacks of experts in its second block: E x d_in x d_out in gpt-oss, E x d_out x d_in elsewhere."""
    tensors = llama()
    generator = torch.Generator().manual_seed(3)
    for name, (outputs, inputs) in {"gate_up_proj": (40, 16), "down_proj": (16, 20)}.items():
        shape = (3, inputs, outputs) if transposed else (3, outputs, inputs)
        tensors[f"model.layers.1.mlp.experts.{name}"] = 0.1 * torch.randn(shape, generator=generator)
    more = {"model_type": "gpt_oss" if transposed else "qwen3_moe", "num_local_experts": 3}
    return tensors, llama_config(tensors) | more | {"architectures": ["Unknown"]}


def numbered() -> tuple[Tensors, dict[str, object]]:
    """A Llama with matrices of three experts in its second block, of which one learns nothing."""
    tensors = llama()
    generator = torch.Generator().manual_seed(3)
    for number in range(3):
        for name, shape in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            path = f"model.layers.1.block_sparse_moe.experts.{number}.{name}.weight"
            tensors[path] = 0.1 * torch.randn(shape, generator=generator)
    return tensors, llama_config(tensors) | {"architectures": ["Unknown"], "num_local_experts": 3}


def gpt2() -> tuple[Tensors, dict[str, object]]:
    """Conv1D weights, one of them square."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"wte.weight": (32, 16), "wpe.weight": (8, 16), "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for block in range(2):
        inside = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
        for name, shape in inside.items():
            shapes |= {f"h.{block}.{name}.weight": shape, f"h.{block}.{name}.bias": shape[1:]}
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors, {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}


MODELS = {
    "llama": lambda: (llama(), llama_config(llama())),
    "stacks": lambda: stacks(False),
    "transposed stacks": lambda: stacks(True),
    "numbered experts": numbered,
    "Conv1D": gpt2,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("embeddings", ["skip", "lora"])
def test_the_adapter_on_the_base_is_the_fine_tuned_model(model: str, embeddings: str, tmp_path: Path) -> None:
    base, config = MODELS[model]()
    write_model(tmp_path / "base", base, config=config)
    tuned = {name: tensor + learnt(name, tensor, embeddings) for name, tensor in base.items()}
    write_model(tmp_path / "tuned", tuned, config=config)
    report = api.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=RANK, embeddings=embeddings, progress=False
    )
    assert report.error_of_all < 1e-5
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "out"), "parameters": {"weight": 1.0}}],
    }
    merge(recipe, tmp_path / "again", progress=False)
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == tuned.keys()
    for name, tensor in tuned.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def learnt(name: str, tensor: torch.Tensor, embeddings: str) -> torch.Tensor:
    """A difference of low rank, of each matrix of a stack; none of vectors, of one expert, of tables not asked for."""
    tables = ("embed", "lm_head", "wte", "wpe")
    if tensor.ndim < 2 or ".experts.1." in name or (embeddings == "skip" and any(word in name for word in tables)):
        return torch.zeros_like(tensor)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    left = torch.randn(*tensor.shape[:-1], RANK, generator=generator)
    return 0.02 * left @ torch.randn(*tensor.shape[:-2], RANK, tensor.shape[-1], generator=generator)
