"""diffusers: a pipeline names its components, and a component is written under the names that its loader looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError, PlanError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import tree, write_config

STEM = "diffusion_pytorch_model"


def write_unet(folder: Path, value: float, names: tuple[str, ...] = (f"{STEM}.safetensors",)) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}')
    for name in names:
        content = {"conv_in.weight": torch.full((2, 2, 3, 3), value), "conv_in.bias": torch.full((2,), value)}
        if "fp16" in name:
            content = {key: (100 * tensor).half() for key, tensor in content.items()}
        torch.save(content, folder / name) if name.endswith(".bin") else save_file(content, folder / name)


@pytest.fixture
def pipelines(tmp_path: Path) -> Path:
    for number, name in enumerate(("base", "e0", "e1")):
        write_unet(tmp_path / name / "unet", float(number), (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"))
        write_unet(tmp_path / name / "vae", float(number), (f"{STEM}.bin",))
        write_unet(tmp_path / name / "text_encoder", float(number), ("model.safetensors",))
        (tmp_path / name / "scheduler").mkdir()
        (tmp_path / name / "scheduler/scheduler_config.json").write_text("{}")
        (tmp_path / name / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return tmp_path


def test_a_pipeline_is_refused_and_names_its_components(pipelines: Path) -> None:
    write_config(pipelines, "linear")
    with pytest.raises(PlanError) as caught:
        pymerge.plan(pipelines / "merge.yml")
    assert len(caught.value.problems) == 3
    for part in ("text_encoder", "unet", "vae"):
        assert str(pipelines / "base" / part) in caught.value.problems[0]
    assert "scheduler" not in caught.value.problems[0]


def test_a_single_file_in_a_pipelines_folder_is_not_taken_for_it(pipelines: Path) -> None:
    save_file({"x": torch.zeros(1)}, pipelines / "base/v1-5-pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"is a diffusers pipeline.*or give one of the files: .*v1-5-pruned"):
        open_checkpoint(pipelines / "base")


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("shard", ["1GB", "100B"])
def test_a_component_is_merged_and_named_as_its_loader_wants(part: str, shard: str, pipelines: Path) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(pipelines / "base" / part),
        "models": [{"model": str(pipelines / name / part), "parameters": {"weight": 1}} for name in ("e0", "e1")],
    }
    pymerge.merge(config, pipelines / "out", device="cpu", progress=False, max_shard_size=shard)
    found = {name for name in tree(pipelines / "out") if STEM in name}
    if shard == "1GB":
        assert found == {f"{STEM}.safetensors"}
    else:
        index = json.loads((pipelines / "out" / f"{STEM}.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == found - {f"{STEM}.safetensors.index.json"}
    for file in sorted((pipelines / "out").glob("*.safetensors")):
        for tensor in load_file(file).values():
            assert torch.equal(tensor, torch.full_like(tensor, 3.0))
    assert json.loads((pipelines / "out/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert open_checkpoint(pipelines / "out").stem == STEM
    assert verify(pipelines / "out").problems == []


def test_diffusers_takes_the_index_where_a_single_file_is_there_too(tmp_path: Path) -> None:
    write_unet(tmp_path / "unet", 1.0)
    save_file({"a": torch.ones(1)}, tmp_path / f"unet/{STEM}-00001-of-00001.safetensors")
    index = {"weight_map": {"a": f"{STEM}-00001-of-00001.safetensors"}}
    (tmp_path / f"unet/{STEM}.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path / "unet").tensors) == {"a"}


def test_a_variant_alone_is_taken_and_written_without_it(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e0")):
        write_unet(tmp_path / name, float(number), (f"{STEM}.fp16.safetensors",))
    write_config(tmp_path, "linear", experts=1)
    plan = pymerge.plan(tmp_path / "merge.yml", device="cpu")
    assert any(f"its weights are taken from {STEM}.fp16.safetensors" in warning for warning in plan.warnings)
    assert [layout.file for layout in plan.layouts] == [f"{STEM}.safetensors"]
