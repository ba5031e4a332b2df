"""Real architectures on disk, merged by every method, loaded back by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import pymerge

METHODS = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.8, "density": 0.4},
    "della": {"weight": 0.8, "density": 0.4},
    "wudi": {"iterations": 30},
    "ace": {},
}
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "moe": Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    ),
}
CLASSES = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "moe": Qwen3MoeForCausalLM}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoints(request, tmp_path_factory) -> tuple[str, Path]:
    """A sharded base and three experts in bfloat16, as save_pretrained writes them."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = CLASSES[name](CONFIGS[name]).to(torch.bfloat16)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for task in range(-1, 3):
        generator = torch.Generator().manual_seed(task + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if task >= 0:
                    noise = 1e-3 * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter.float() + noise)
        model.save_pretrained(folder / ("base" if task < 0 else f"expert{task}"), max_shard_size="60KB")
        model.load_state_dict(base)
    return name, folder


def config_of(folder: Path, method: str) -> dict[str, object]:
    parameters = dict(METHODS[method])
    weight = {"weight": parameters.pop("weight")} if "weight" in parameters else {}
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"expert{task}"), "parameters": weight} for task in range(3)],
        "parameters": parameters,
    }


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("method", METHODS)
def test_merged_on_disk_equals_merged_in_memory(checkpoints, method, tmp_path):
    name, folder = checkpoints
    out = tmp_path / "out"
    report = pymerge.merge(config_of(folder, method), out, progress=False, max_shard_size="60KB", device="cpu")

    on_disk = load_tensors(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sorted(index["weight_map"]) == sorted(on_disk)
    base, *experts = (load_tensors(folder / part) for part in ("base", "expert0", "expert1", "expert2"))
    assert sorted(on_disk) == sorted(base)
    in_memory = pymerge.merge_state_dicts(base, experts, method, **METHODS[method])
    for key, tensor in in_memory.items():
        torch.testing.assert_close(on_disk[key], tensor, rtol=0, atol=0, msg=key)

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).eval()
    missing = expected.load_state_dict(_as_module_names(expected, in_memory), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    expected.tie_weights()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = loaded(tokens).logits
        torch.testing.assert_close(logits, expected(tokens).logits, rtol=0, atol=0)
        original = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        assert not torch.equal(logits, original(tokens).logits)
    assert report.parameters == sum(tensor.numel() for tensor in base.values())
    assert loaded.num_parameters() == original.num_parameters()


def _as_module_names(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers may hold the experts of a mixture fused and store them one by one: stack them as it does."""
    if set(tensors) <= set(model.state_dict()):
        return tensors
    fused = {k: v for k, v in tensors.items() if ".experts." not in k}
    for key, parameter in model.state_dict().items():
        if key in fused or ".experts." not in key:
            continue
        prefix, leaf = key.rsplit(".", 1)
        parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
        stacks = [
            torch.stack([tensors[f"{prefix}.{i}.{part}.weight"] for i in range(parameter.shape[0])]) for part in parts
        ]
        fused[key] = torch.cat(stacks, dim=1)
    return fused


def test_gpt2_is_merged_on_its_input_side(checkpoints, tmp_path):
    """Conv1D weights are d_in x d_out; the plan says so from the biases, and the square ones follow."""
    name, folder = checkpoints
    plan = pymerge.plan(config_of(folder, "wudi"))
    axes = {step.name: step.role.in_axis for step in plan.steps if step.role.solvable}
    assert axes
    assert set(axes.values()) == ({0} if name == "gpt2" else {1})


def test_an_untied_copy_of_a_tied_head_is_written_once(tmp_path):
    """Some checkpoints store lm_head beside the embedding it is tied to."""
    model = LlamaForCausalLM(CONFIGS["llama"])
    for part in ("base", "expert"):
        model.save_pretrained(tmp_path / part)
        file = tmp_path / part / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt"})
    config = {
        "merge_method": "ace",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert")}],
    }
    report = pymerge.merge(config, tmp_path / "out", progress=False)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert any("lm_head.weight" in warning for warning in report.warnings)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == model.num_parameters()


def test_output_dtype_reaches_weights_and_config(checkpoints, tmp_path):
    _, folder = checkpoints
    pymerge.merge(config_of(folder, "task_arithmetic"), tmp_path / "out", dtype="float32", progress=False)
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32
