"""Live models of transformers: merged in place they are what merging their files gives, and go on working."""

from __future__ import annotations

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
        for kind, experts in {"modules": models[1:], "paths": paths[1:]}.items():
            base = trained(transformers, family)[0]
            storages = [parameter.data_ptr() for parameter in base.parameters()]
            pymerge.merge_into(base, experts, method, **kwargs)
            found = state_of(base, tmp_path / f"{method}-{kind}")
            assert found.keys() == expected.keys()
            different = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert not different, (method, kind, different)
            assert [parameter.data_ptr() for parameter in base.parameters()] == storages
            assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
