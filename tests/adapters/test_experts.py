"""Stacks of experts: PEFT's factors of parameters of three axes, on files that hold experts in any form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

from pymerge.adapters.low_rank import low_rank_of
from pymerge.adapters.summed import summed
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.errors import CheckpointError
from tests.helpers.adapters import opened, read_all, write_adapter
from tests.helpers.checkpoints import write_model

COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Mixtral": (MixtralConfig, MixtralForCausalLM, {"intermediate_size": 24, "num_local_experts": 4}),
    "Mixtral, square": (MixtralConfig, MixtralForCausalLM, {"intermediate_size": 8, "num_local_experts": 4}),
    "Qwen3-MoE": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"moe_intermediate_size": 12, "num_experts": 4}),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, {"intermediate_size": 24, "num_local_experts": 4}),
    "gpt-oss, square": (GptOssConfig, GptOssForCausalLM, {"intermediate_size": 8, "num_local_experts": 4}),
    "Llama 4": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {"intermediate_size": 24, "intermediate_size_mlp": 20, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
}
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, model, sizes = MODELS[name]
    found: nn.Module = model(config(**COMMON | sizes))
    return found


@pytest.mark.parametrize("targets", [[UP, DOWN], [DOWN], [UP]], ids=["both", "down", "gate and up"])
@pytest.mark.parametrize("name", MODELS)
def test_what_peft_merges_in_memory(name: str, targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets, rank_pattern={DOWN: 4}
    )
    made(name).save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(made(name), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(made(name), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base, expected = (read_all(open_checkpoint(tmp_path / folder)) for folder in ("base", "merged"))
    found = read_all(opened(tmp_path / "base", tmp_path / "adapter"))
    assert found.keys() == expected.keys()
    changed = [tensor for tensor in base if not torch.equal(base[tensor], expected[tensor])]
    assert any("experts" in tensor for tensor in changed)
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=1e-6, atol=1e-6)


def numbered(experts: int = 3, hidden: int = 6, inner: int = 10) -> dict[str, Tensor]:
    """One block of Mixtral as its files hold it."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    return {
        f"model.layers.0.block_sparse_moe.experts.{number}.{word}.weight": torch.randn(size, generator=generator)
        for number in range(experts)
        for word, size in sizes.items()
    }


def stacked(files: dict[str, Tensor], experts: int = 3) -> dict[str, Tensor]:
    """The same as transformers 5 holds it in memory."""
    inside = "model.layers.0.block_sparse_moe.experts"

    def of(word: str) -> list[Tensor]:
        return [files[f"{inside}.{number}.{word}.weight"] for number in range(experts)]

    gate_up = [torch.cat(pair) for pair in zip(of("w1"), of("w3"), strict=True)]
    return {
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(gate_up),
        "model.layers.0.mlp.experts.down_proj": torch.stack(of("w2")),
    }


def of_each(files: dict[str, Tensor], rank: int = 2) -> dict[str, Tensor]:
    """Factors of single experts, as transformers 4 names them."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, tensor in files.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        found[f"{stem}.lora_A.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
        found[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], rank, generator=generator)
    return found


def test_factors_of_single_experts_on_either_form_of_the_base(tmp_path: Path) -> None:
    files = numbered()
    adapter = write_adapter(tmp_path / "a", of_each(files), r=2, lora_alpha=2)
    apart = read_all(opened(write_model(tmp_path / "apart", files), adapter))
    whole = read_all(opened(write_model(tmp_path / "whole", stacked(files)), adapter))
    expected = stacked(apart)
    assert whole.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor, stacked(files)[name])


def test_single_experts_in_any_rows(tmp_path: Path) -> None:
    files = numbered()
    checkpoint = opened(
        write_model(tmp_path / "whole", stacked(files)), write_adapter(tmp_path / "a", of_each(files), r=2)
    )
    assert checkpoint.base is not None
    entry = checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    low = low_rank_of(entry)
    assert low is not None
    assert (low.stacked, low.rank) == (True, 4)  # two factors, one above the other
    with Reader(checkpoint.stamps | checkpoint.base.stamps) as reader:
        whole = reader.read(entry)
        for number in range(3):
            assert torch.equal(reader.read(entry, number, number + 1)[0], whole[number])
            left, right = low.factors(reader.read_bytes, number)
            tau = whole[number].double() - stacked(files)["model.layers.0.mlp.experts.gate_up_proj"][number].double()
            torch.testing.assert_close(torch.from_numpy(left @ right), tau, rtol=1e-4, atol=1e-4)


def test_a_sum_of_adapters_on_a_stack(tmp_path: Path) -> None:
    files = numbered()
    base = write_model(tmp_path / "whole", stacked(files))
    checkpoint = opened(base, write_adapter(tmp_path / "a", of_each(files), r=2))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    own, entry = open_checkpoint(base).tensors[name], checkpoint.tensors[name]
    found = summed(own, [entry, own, entry], [0.5, 3.0, 0.25])
    assert found is not None
    with Reader(checkpoint.stamps) as reader:
        origin, whole, added = (reader.read(each).double() for each in (own, entry, found))
    torch.testing.assert_close(added, origin + 0.75 * (whole - origin), rtol=1e-5, atol=1e-5)
    assert summed(own, [own], [1.0]) is None
    assert summed(own, [entry.rows(0, 1)], [1.0]) is None


def test_factors_that_fit_no_parameter(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", stacked(numbered()))
    stem = "base_model.model.model.layers.0.mlp.experts"
    found = {f"{stem}.lora_A.weight": torch.ones(6, 7), f"{stem}.lora_B.weight": torch.ones(20, 6)}
    with pytest.raises(
        CheckpointError, match=r"the factors of model\.layers\.0\.mlp\.experts \(A \[6, 7\], B \[20, 6\]\)"
    ):
        opened(base, write_adapter(tmp_path / "a", found, r=2))
