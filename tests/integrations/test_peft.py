"""Live adapters of PEFT merged: as their files are merged, and as PEFT itself has it where that is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import pymerge
from pymerge import api
from pymerge.errors import PlanError, PymergeError
from tests.adapters.test_peft import _quiet, gpt2, layers, llama, save, trained, vit

peft = pytest.importorskip("peft")
integration = pytest.importorskip("pymerge.integrations.peft")
__all__ = ["_quiet"]

TOKENS = torch.arange(12).view(2, 6)
LLAMA = ["q_proj", "v_proj", "up_proj"]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(num_local_experts=3, max_position_embeddings=16, **sizes, **heads))


def config(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LLAMA, **more})


def further(model: Any, name: str, config: Any, seed: int = 2) -> Any:
    """The model with one more adapter, of random values."""
    model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key or key.endswith(f".{name}"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def two(make: Callable[[], nn.Module] = llama, dtype: torch.dtype = torch.float32, targets: Any = None) -> Any:
    """A model with two adapters: a plain one, and one of rsLoRA with another rank in one module."""
    names = targets or LLAMA
    model = trained(make().to(dtype), config(target_modules=names))
    pattern = {f"0.*{names[0].rpartition('.')[2]}": 2}
    other = config(target_modules=names[:2], r=3, use_rslora=True, rank_pattern=pattern)
    return further(model, "other", other)


def folders(
    model: Any, make: Callable[[], nn.Module], path: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The model's base and adapters on the disk, as the models of a config."""
    save(make().to(dtype), path / "base")
    model.save_pretrained(path / "adapters")
    names = [path / "adapters" / ("" if name == "default" else name) for name in model.peft_config]
    return {"base_model": str(path / "base"), "models": [{"model": str(name)} for name in names]}


def values(model: Any, name: str) -> dict[str, Tensor]:
    return dict(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logits(model: Any, adapter: str | None = None) -> Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("method", "parameters", "rank"),
    [
        ("task_arithmetic", {"weights": [0.75, -0.5]}, "exact"),
        ("task_arithmetic", {"weights": {"other": -0.5, "default": 0.75}}, 3),
        ("wudi_flow", {}, "exact"),
        ("tsv_m", {}, 0.9),
        ("ties", {"weights": [0.6, 0.4], "density": 0.5}, 4),
    ],
)
def test_a_new_adapter_is_that_of_the_files(tmp_path: Path, method: str, parameters: Any, rank: Any) -> None:
    model = two()
    recipe = folders(model, llama, tmp_path)
    given = {key: value for key, value in parameters.items() if key != "weights"}
    numbers = parameters.get("weights", [])
    numbers = [numbers["default"], numbers["other"]] if isinstance(numbers, dict) else numbers
    for entry, weight in zip(recipe["models"], numbers, strict=False):
        entry["parameters"] = {"weight": weight}
    report = pymerge.merge_adapters(
        {"merge_method": method, **recipe, "parameters": given}, tmp_path / "out", rank=rank, progress=False
    )
    merged = integration.add_merged_adapter(model, ["default", "other"], "merged", method, rank=rank, **parameters)
    found, wanted = values(model, "merged"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert model.peft_config["merged"].r == said["r"] == report.rank == max(merged.ranks.values())
    assert model.peft_config["merged"].rank_pattern == said["rank_pattern"]
    lost = {each.name.removesuffix(".weight"): each.error**2 for each in report.tensors}
    assert merged.lost == pytest.approx(lost)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("task_arithmetic", {}), ("linear", {}), ("ties", {"density": 0.5}), ("wudi_flow", {}), ("model_stock", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_the_files(
    tmp_path: Path, method: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    model = two(dtype=dtype)
    own = {name: tensor.data_ptr() for name, tensor in model.get_base_model().named_parameters() if "lora" not in name}
    needed = {"weight": 1.0} if method in ("task_arithmetic", "linear", "ties") else {}
    recipe = {"merge_method": method, **folders(model, llama, tmp_path, dtype), "parameters": needed | parameters}
    api.merge(recipe, tmp_path / "out", progress=False, device="cpu")
    merged = integration.merge_adapters_into(model, ["default", "other"], method, device="cpu", **parameters)
    found, wanted = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert {tensor.data_ptr() for tensor in merged.parameters()} == set(own.values())
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())


@pytest.mark.parametrize(
    ("make", "targets"),
    [(gpt2, ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]), (layers, ["one", "two", "three", "square"])],
)
def test_other_layers_are_those_of_the_files(tmp_path: Path, make: Any, targets: list[str]) -> None:
    model = two(make, targets=targets)
    recipe = {"merge_method": "wudi_flow", **folders(model, make, tmp_path)}
    api.merge(recipe, tmp_path / "out", progress=False, device="cpu")
    merged = integration.merge_adapters_into(model, ["default", "other"], "wudi_flow", device="cpu")
    found, wanted = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


VARIANTS: dict[str, Any] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "1.*v_proj": 3}, "alpha_pattern": {"up_proj": 3}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 4, 7]}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_is_itself(variant: str) -> None:
    """With weight 1 as a new adapter, and in the weights, against PEFT's forward pass."""
    model = trained(llama(), config(**VARIANTS[variant]))
    wanted = logits(model)
    if variant == "dora":
        with pytest.raises(PlanError, match="DoRA"):
            integration.add_merged_adapter(model, ["default"], "again")
    else:
        integration.add_merged_adapter(model, ["default"], "again", full_tensors="merge")
        assert model.active_adapters == ["default"]
        torch.testing.assert_close(logits(model, "again"), wanted, rtol=0, atol=1e-5)
        model.set_adapter("default")
    merged = integration.merge_adapters_into(model, ["default"])
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["patterns", "dora", "lora_bias", "modules_to_save", "tokens", "embeddings"])
def test_two_of_a_variant_add_up(variant: str) -> None:
    """The new adapter, where there is one, and the weights are W_0 + 0.5 tau_1 + 0.25 tau_2 of PEFT's own merges."""
    model = further(trained(llama(), config(**VARIANTS[variant])), "other", config(**VARIANTS[variant]))
    base, alone = weights(llama()), []
    for name in ("default", "other"):
        other = copy.deepcopy(model)
        other.set_adapter(name)
        alone.append(weights(other.merge_and_unload(adapter_names=[name])))
    wanted = {
        name: tensor + 0.5 * (alone[0][name] - tensor) + 0.25 * (alone[1][name] - tensor)
        for name, tensor in base.items()
    }
    if variant != "dora":
        integration.add_merged_adapter(model, ["default", "other"], "merged", weights=[0.5, 0.25], full_tensors="merge")
        other = copy.deepcopy(model)
        other.set_adapter("merged")
        found = weights(other.merge_and_unload(adapter_names=["merged"]))
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-6, msg=name)
    found = weights(integration.merge_adapters_into(model, ["default", "other"], weights=[0.5, 0.25]))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-6, msg=name)


def test_it_is_what_peft_calls_cat() -> None:
    model = two()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "cat", "cat")
    merged = integration.add_merged_adapter(model, ["default", "other"], "merged", weights=[0.5, 0.25])
    assert max(merged.lost.values()) < 1e-12  # rounding of the factors, squared
    torch.testing.assert_close(logits(model, "merged"), logits(model, "cat"), rtol=0, atol=1e-6)


def test_a_saved_adapter_is_loaded_again(tmp_path: Path) -> None:
    model = two()
    merged = integration.add_merged_adapter(model, ["default", "other"], "merged", rank=3)
    assert set(merged.ranks.values()) == {3}
    assert all(0 < lost < 1 for path, lost in merged.lost.items() if "q_proj" in path)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model, "merged"), rtol=0, atol=1e-6)


def test_experts_in_stacks() -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = trained(mixtral(), config(target_modules=["q_proj"], target_parameters=parameters))
    further(model, "other", config(target_modules=["q_proj"], target_parameters=parameters, r=2, lora_alpha=1))
    one = copy.deepcopy(model)
    wanted = weights(one.merge_and_unload(adapter_names=["default", "other"]))
    merged = integration.add_merged_adapter(model, ["default", "other"], "merged", weights=[1.0, 1.0])
    assert merged.ranks["model.layers.0.mlp.experts.down_proj"] == 6
    one = copy.deepcopy(model)
    one.set_adapter("merged")
    found = weights(one.merge_and_unload())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    found = weights(integration.merge_adapters_into(model, ["default", "other"], weights=[1.0, 1.0]))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_the_router_of_experts(tmp_path: Path) -> None:
    """A parameter of two axes, which PEFT adapts by its name, as it does with all-linear."""
    model = two(mixtral, targets=["q_proj", "gate"])
    assert any("gate.weight" in config.target_parameters for config in model.peft_config.values())
    said = {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}, **folders(model, mixtral, tmp_path)}
    pymerge.merge(said, tmp_path / "files")
    live = integration.merge_adapters_into(model, ["default", "other"], "task_arithmetic")
    found = load_file(save(live, tmp_path / "live") / "model.safetensors")
    expected = load_file(tmp_path / "files" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_attention_of_pytorch() -> None:
    model = trained(layers(), config(target_modules=["attention", "point", "table"]))
    wanted = weights(copy.deepcopy(model).merge_and_unload())
    found = weights(integration.merge_adapters_into(model, ["default"]))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def tied() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    "more", [{"trainable_token_indices": [1, 4]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}]
)
def test_heads_that_are_tied(more: dict[str, Any]) -> None:
    model = trained(tied(), config(**more))
    wanted = logits(model)
    integration.add_merged_adapter(model, ["default"], "again", full_tensors="merge")
    torch.testing.assert_close(logits(model, "again"), wanted, rtol=0, atol=1e-5)
    model.set_adapter("default")
    merged = integration.merge_adapters_into(model, ["default"])
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5)


def test_a_scale_that_was_set_counts() -> None:
    model = two()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.25)
    wanted = logits(model, "default")
    integration.add_merged_adapter(model, ["default"], "again")
    torch.testing.assert_close(logits(model, "again"), wanted, rtol=0, atol=1e-6)


def test_models_without_a_peft_model_around_them() -> None:
    model = llama()
    peft.inject_adapter_in_model(config(), model, "one")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    wanted = logits(model)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    integration.add_merged_adapter(model, ["one"], "again", weights=[2.0])
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)
    merged = integration.merge_adapters_into(model, ["again"], weights=[0.5])
    assert merged is model
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=2e-6)


def test_quantised_weights_need_not_be_read() -> None:
    """The shapes of a base whose weights are codes are those that its layers say; only reading them is refused."""
    model = two()
    wanted = integration.add_merged_adapter(two(), ["default", "other"], "merged").ranks
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer.weight = nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)
    assert integration.add_merged_adapter(model, ["default", "other"], "merged").ranks == wanted
    with pytest.raises(PymergeError, match=r"q_proj\.weight' is quantised .*dequantize"):
        integration.merge_adapters_into(model, ["default", "other"])


def test_a_classifier_and_its_head() -> None:
    model = trained(vit(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    picture = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model.eval()(picture).logits
        integration.add_merged_adapter(model, ["default"], "again", full_tensors="merge")
        model.set_adapter("again")
        torch.testing.assert_close(model.eval()(picture).logits, wanted, rtol=0, atol=1e-6)
