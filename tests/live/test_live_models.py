"""Live models of transformers: merged in place they are what merging their files gives, and go on working."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from tests.helpers.live_models import FAMILIES, merged_files, saved, trained

transformers = pytest.importorskip("transformers", minversion="5.0")

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": [0.4, 0.7], "lambda": 0.9},
    "ties": {"weight": [1.0, 0.5], "density": [0.5, 0.3]},
    "dare_ties": {"weight": [1.0, 0.5], "density": [0.5, 0.3], "random_seed": 3},
    "wudi_flow": {"time": 30.0},
}


def state_of(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What a model is in files, through transformers itself."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_live_is_files(family: str, tmp_path: Path) -> None:
    models = trained(transformers, family)
    paths = saved(models, tmp_path)
    for method, parameters in METHODS.items():
        expected = merged_files(paths, tmp_path / method, method, parameters)
        kwargs = {name.replace("lambda", "lambda_"): value for name, value in parameters.items()}
        loaded = [type(models[0]).from_pretrained(path).eval() for path in paths]  # with names in another order
        for kind, experts in {"modules": models[1:], "paths": paths[1:], "loaded": loaded[1:]}.items():
            base = trained(transformers, family)[0] if kind == "modules" else copy.deepcopy(loaded[0])
            storages = [parameter.data_ptr() for parameter in base.parameters()]
            pymerge.merge_into(base, experts, method, **kwargs)
            found = state_of(base, tmp_path / f"{method}-{kind}")
            assert found.keys() == expected.keys()
            different = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert not different, (method, kind, different)
            assert [parameter.data_ptr() for parameter in base.parameters()] == storages
            assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_generating_goes_on(family: str, tmp_path: Path) -> None:
    models = trained(transformers, family)
    paths = saved(models, tmp_path)
    merged_files(paths, tmp_path / "out", "task_arithmetic", {"weight": [0.4, 0.7]})
    merged = type(models[0]).from_pretrained(tmp_path / "out").eval()
    live, tokens = models[0], torch.tensor([[3, 4, 5]])
    live.generate(tokens, max_new_tokens=2, do_sample=False)
    pymerge.merge_into(live, models[1:], "task_arithmetic", weight=[0.4, 0.7])
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (model.generate(tokens, **settings) for model in (live, merged))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(one, two) for one, two in zip(ours.logits, theirs.logits, strict=True))


def test_experts_of_a_mixture_by_names_in_memory(tmp_path: Path) -> None:
    """A state dict has stacks of experts, as the module; the base's files have each expert by itself."""
    models = trained(transformers, "mixtral")
    paths = saved(models, tmp_path)
    expected = merged_files(paths, tmp_path / "out", "ties", {"weight": [0.4, 0.7], "density": [0.5, 0.5]})
    experts = [model.state_dict() for model in models[1:]]
    assert any(name.endswith("experts.gate_up_proj") for name in experts[0])
    pymerge.merge_into(models[0], experts, "ties", weight=[0.4, 0.7], density=0.5)
    found = state_of(models[0], tmp_path / "live")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    merged = pymerge.Merger(paths[0], experts, "ties", weight=[0.4, 0.7], density=0.5).merge()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
