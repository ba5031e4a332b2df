"""Files of Grams against the names that models have for their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import pymerge
from tests.helpers.checkpoints import change, llama, load_output, write_models


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the model without a head is saved."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def test_grams_have_the_names_of_their_own_model(tmp_path: Path) -> None:
    """A model may have other names than the base, and pymerge collect writes those: the merge is the same."""
    models = write_models(tmp_path, llama(tied=True), experts=2)
    generator = torch.Generator().manual_seed(1)
    weights = {name: tensor for name, tensor in load_output(models / "base").items() if "_proj" in name}
    for number in range(2):
        inputs = {name: torch.randn(40, tensor.shape[1], generator=generator) for name, tensor in weights.items()}
        save_file({name: x.mT @ x / 40 for name, x in inputs.items()}, tmp_path / f"g{number}.safetensors")
    entries = [{"model": f"e{number}", "parameters": {"grams": f"g{number}.safetensors"}} for number in range(2)]
    config = tmp_path / "merge.yml"
    config.write_text(str({"merge_method": "regmean", "base_model": "base", "models": entries}))
    pymerge.merge(config, tmp_path / "same", device="cpu", progress=False)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        others = _renamed(tensors)
        tensors.clear()
        tensors.update(others)

    change(models / "e1", rename)
    assert "layers.0.mlp.up_proj.weight" in load_output(models / "e1")
    file = tmp_path / "g1.safetensors"
    grams = _renamed(load_file(file))
    save_file(grams, file)
    assert not [warning for warning in pymerge.plan(config).warnings if "Gram" in warning]
    pymerge.merge(config, tmp_path / "other", device="cpu", progress=False)
    same, other = load_output(tmp_path / "same"), load_output(tmp_path / "other")
    assert same.keys() == other.keys()
    assert [name for name, tensor in same.items() if not torch.equal(tensor, other[name])] == []
