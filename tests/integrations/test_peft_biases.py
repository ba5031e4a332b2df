"""Live adapters of PEFT that train the model's own biases, which PEFT then has nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pymerge import api
from pymerge.errors import ArgumentError
from tests.adapters.test_peft import _quiet, llama, trained, vit
from tests.integrations.test_peft import config, folders, further, integration, logits, mixtral, weights

__all__ = ["_quiet"]
BIASED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora_only": (llama, {"bias": "lora_only"}),
    "all": (llama, {"bias": "all"}),
    "renamed in files": (vit, {"bias": "all", "target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("what", BIASED)
@pytest.mark.parametrize("form", ["folder", "module"])
def test_trained_biases_are_merged_as_files_are(tmp_path: Path, what: str, form: str) -> None:
    make, more = BIASED[what]
    model = further(trained(make(), config(**more)), "other", config(**more | {"bias": "none"}))
    recipe = {"merge_method": "task_arithmetic", **folders(model, make, tmp_path), "parameters": {"lambda": 0.5}}
    for entry, weight in zip(recipe["models"], [1.0, 0.25], strict=True):
        entry["parameters"] = {"weight": weight}
    api.merge(recipe, tmp_path / "out", progress=False, device="cpu")
    base = tmp_path / "base" if form == "folder" else make()
    merged = integration.merge_adapters_into(model, ["default", "other"], weights=[1.0, 0.25], base=base, lambda_=0.5)
    merged.save_pretrained(tmp_path / "merged")
    found, wanted = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    own = load_file(tmp_path / "base/model.safetensors")
    assert any(name.endswith("bias") and not torch.equal(found[name], own[name]) for name in own)


def test_other_adapters_leave_the_biases_of_the_base() -> None:
    model = further(trained(llama(), config(bias="all")), "other", config())
    with pytest.raises(ArgumentError, match=r"adapter 'default' has bias='all'.* give base="):
        integration.merge_adapters_into(model, ["other"])
    found, own = weights(integration.merge_adapters_into(model, ["other"], base=llama())), weights(llama())
    biases = [name for name in own if name.endswith("bias")]
    assert biases
    assert all(torch.equal(found[name], own[name]) for name in biases)


def test_a_new_adapter_has_no_place_for_trained_biases() -> None:
    model = trained(llama(), config(bias="lora_only"))
    wanted = logits(model)
    with pytest.raises(ArgumentError, match=r"full_tensors='skip'.*merge_adapters_into"):
        integration.add_merged_adapter(model, ["default"], "new", full_tensors="merge")
    assert list(model.peft_config) == ["default"]
    integration.add_merged_adapter(model, ["default"], "new", full_tensors="skip")
    torch.testing.assert_close(logits(model, "new"), wanted, rtol=0, atol=1e-5)  # the biases are the model's now
    with pytest.raises(ArgumentError, match="give the model that the adapters are for"):
        integration.merge_adapters_into(model, ["default"], base=mixtral())
