"""Adapters as models of a plan: how they are named, what is made of them, what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pymerge.cli.tensor_table import tensor_rows
from tests.helpers.adapter_merges import (
    MODULES,
    STEM,
    UP,
    config,
    merged,
    near,
    planned,
    refusal,
    same,
    write_adapted_models,
)
from tests.helpers.adapters import factors, opened, read_all
from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model
from tests.helpers.factored import write_products


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_adapted_models(tmp_path)


NAMES = {
    "alone": "a0",
    "with its base": "base+a0",
    "as a mapping": {"model": {"model": {"path": "base"}, "lora": {"path": "a0"}}},
    "as a mapping of texts": {"model": {"model": "base", "lora": "a0"}},
    "by its file": "a0/adapter_model.safetensors",
    "by another spelling": "./base+./a0",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_an_adapter_is_the_model_that_it_makes(models: Path, name: str) -> None:
    found = merged(config(models, NAMES[name], "a1", method="ties", parameters={"weight": 1.0, "density": 0.5}))
    same(found, merged(config(models, "e0", "e1", method="ties", parameters={"weight": 1.0, "density": 0.5}), "whole"))


def test_a_base_of_another_name_is_said(models: Path) -> None:
    file = models / "a0" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/other-bnb-4bit"}))
    assert any(
        "was trained on 'org/other-bnb-4bit', and is applied to" in each
        for each in planned(config(models, "a0")).warnings
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}))
    assert planned(config(models, "a0")).warnings == ()


def test_one_adapter_under_two_names_counts_twice(models: Path) -> None:
    plan = planned(config(models, "a0", "base+a0"))
    assert plan.warnings == ("'base+a0' is the same adapter as 'a0': it counts twice",)
    same(merged(models / "merge.yml"), merged(config(models, "a0", "a0"), "twice"))


def in_other_forms(models: Path) -> list[str]:
    """The adapter a0 as others would write it, by the names that a config may have for it."""
    tensors = load_file(models / "a0" / "adapter_model.safetensors")
    mlx, kohya, diffusers = Tensors(), Tensors(), Tensors()
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(STEM).removesuffix(".weight").rpartition(".")
        flat = f"lora_unet_{module.removeprefix('model.').replace('.', '_')}"
        mlx[f"{module}.{factor.lower()}"] = tensor.T.contiguous()
        kohya[f"{flat}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
        kohya[f"{flat}.alpha"] = torch.tensor(6.0)
        diffusers[f"transformer.{module.removeprefix('model.')}.{factor}.weight"] = tensor
    said = {"transformer.r": 3, "transformer.lora_alpha": 6}
    (models / "mlx").mkdir()
    save_file(mlx, models / "mlx" / "adapters.safetensors")
    (models / "mlx" / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.0}})
    )
    save_file(kohya, models / "kohya.safetensors")
    (models / "lora").mkdir()
    save_file(
        diffusers,
        models / "lora" / "pytorch_lora_weights.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(said)},
    )
    files = ["mlx", "mlx/adapters.safetensors", "kohya.safetensors", "lora", "lora/pytorch_lora_weights.safetensors"]
    return [*files, "base+mlx", "base+kohya.safetensors"]


def test_adapters_in_other_forms(models: Path) -> None:
    """Of mlx-lm, kohya and diffusers: the same bytes as in PEFT's form, by any name, and in a mapping."""
    parameters = {"weight": 1.0, "density": 0.5}
    expected = merged(config(models, "a0", "a1", method="ties", parameters=parameters), "peft")
    names: list[Any] = [*in_other_forms(models), {"model": {"model": "base", "lora": "kohya.safetensors"}}]
    for name in names:
        path = config(models, name, "a1", method="ties", parameters=parameters)
        assert planned(path).warnings == (), name
        same(merged(path), expected)


def test_an_adapter_in_another_form_is_no_base(models: Path) -> None:
    in_other_forms(models)
    for name in ("mlx", "kohya.safetensors", "lora"):
        assert f"base_model '{name}' is an adapter" in refusal(config(models, "a1", base=name))


def test_refusals(models: Path) -> None:
    assert "base_model 'a0' is an adapter; name the model that it is for as base_model" in refusal(
        config(models, "a1", base="a0")
    )
    assert "is an adapter" in refusal(config(models, "a1", base="base+a0"))
    assert "'a0' is an adapter, and there is no base_model; add base_model, or write BASE+a0" in refusal(
        config(models, "a0", "e1", method="linear", base=None)
    )
    assert "is a whole model and no adapter; list it for itself" in refusal(config(models, "base+e0"))
    assert "is an adapter; put its model before the +" in refusal(config(models, "a0+a1"))
    assert "model 'a9' not found" in refusal(config(models, "base+a9"))
    assert "with more than one adapter" in refusal(config(models, "base+a0+a1"))


def test_a_folder_with_a_plus_in_its_name(models: Path) -> None:
    (models / "a0").rename(models / "a+0")
    (models / "e1").rename(models / "e+1")
    assert planned(config(models, "a+0", "e+1")).inputs.experts[0].base is not None
    assert planned(config(models, "base+a+0")).inputs.experts[0].path.name == "a+0"


def test_without_base_model_the_first_adapter_gives_its_own(models: Path) -> None:
    found = merged(config(models, "base+a0", "base+a1", method="linear", base=None))
    near(found, merged(config(models, "e0", "e1", method="linear", base=None), "whole"))
    assert json.loads((models / "out" / "config.json").read_text())["model_type"] == "llama"


def test_adapters_of_another_model_than_the_base(models: Path) -> None:
    """The expert is that model with the adapter: everything differs from the base."""
    expected = read_all(opened(models / "e1", models / "a0"))
    found = merged(config(models, "e1+a0", parameters={"weight": 1.0}))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    both = planned(config(models, "base+a0", "e1+a0"))
    assert len({expert.path for expert in both.inputs.experts}) == 2


def test_slices_of_adapters(models: Path) -> None:
    def sliced(one: str, other: str) -> dict[str, Any]:
        sources = [[{"model": one, "layer_range": [0, 1]}], [{"model": other, "layer_range": [1, 2]}]]
        return {"merge_method": "passthrough", "base_model": "base", "slices": [{"sources": each} for each in sources]}

    path = models / "merge.yml"
    path.write_text(yaml.safe_dump(sliced("base+a0", "a1")))
    found = merged(path)
    path.write_text(yaml.safe_dump(sliced("e0", "e1")))
    same(found, merged(path, "whole"))


@pytest.mark.parametrize("more", [{}, {"extra_tensors": "ignore", "missing_tensors": "base"}], ids=["plain", "ignored"])
@pytest.mark.parametrize("stem", ["", "base_model.model."])
def test_factors_inside_a_model_are_not_left_out(models: Path, stem: str, more: dict[str, str]) -> None:
    """A model that was saved while its adapter was on it."""
    tensors = llama(hidden=24, inner=40)
    found = {key.removeprefix(STEM): tensor for key, tensor in factors(tensors, MODULES).items()}
    wrapped = {f"{stem}{name}": tensor for name, tensor in (tensors | found).items()}
    write_model(models / "wrapped", wrapped, config=llama_config(tensors))
    assert "factors of an adapter that is not merged into its weights" in refusal(config(models, "wrapped", **more))


def test_peak_memory_hardly_grows_with_the_number_of_adapters(models: Path) -> None:
    one, four = (planned(config(models, *["a0"] * count)) for count in (1, 4))
    pieces = max(40 * 24 * 4 * 4 for _ in one.steps)
    assert four.peak_memory - one.peak_memory <= 4 * pieces + 4 * 3 * 64 * 4 * 4


def test_a_sum_of_adapters_reads_the_base_once(models: Path) -> None:
    one, two = (planned(config(models, *names)) for names in (["a0"], ["a0", "a1", "a0"]))
    size = (models / "base" / "model.safetensors").stat().st_size
    adapters = 3 * (models / "a0" / "adapter_model.safetensors").stat().st_size
    assert one.bytes_read <= size + adapters
    assert two.bytes_read <= size + 3 * adapters
    row = next(row for row in tensor_rows(two) if row["name"] == UP)
    assert [Path(each["model"]).name for each in row["inputs"]] == ["base", "a0", "a1", "a0"]


def test_a_plan_holds_little_of_each_factor(tmp_path: Path) -> None:
    """Adapters together have thousands of small tensors: what is known of each is what grows with their number."""
    base = {f"model.layers.{number}.self_attn.q_proj.weight": torch.randn(8, 8) for number in range(100)}
    write_model(tmp_path / "base", base)
    write_products(tmp_path / "a0", tmp_path / "base", {name: (torch.randn(8, 2), torch.randn(2, 8)) for name in base})
    for number in range(1, 9):
        shutil.copytree(tmp_path / "a0", tmp_path / f"a{number}")

    def held(count: int) -> int:
        path = config(tmp_path, *(f"a{number}" for number in range(count)))
        planned(path)  # what is made once, as caches
        tracemalloc.start()
        plan = planned(path)
        gc.collect()
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert plan.steps
        return found

    assert held(9) - held(1) < 8 * 2 * len(base) * 1000
