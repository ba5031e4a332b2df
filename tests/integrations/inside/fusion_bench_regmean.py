"""FusionBench's RegMean and RegMean++ for CLIP as oracles, on images; run by tests/integrations/test_fusion_bench.py,
with FusionBench installed. Theirs compute in float32."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from fusion_bench.method.regmean.clip_regmean import RegMeanAlgorithmForCLIP
from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.modelpool import BaseModelPool
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import pymerge
from pymerge.grams.collect import Settings, collect
from tests.helpers.collected import write_images

TASKS = ("one", "two", "three")
IMAGES = 24
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
FABRIC = SimpleNamespace(setup=lambda model: model, setup_dataloaders=lambda loader: loader)


class Tower(nn.Module):
    """A vision model where FusionBench looks for it: in transformers 4 it was one module further in."""

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.vision_model = transformers.CLIPVisionModel.from_pretrained(folder).eval()

    def forward(self, images: Tensor) -> Any:
        return self.vision_model(images)


class Pool(BaseModelPool):
    """The models and images of a folder."""

    has_pretrained = True
    model_names = TASKS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load_model(self, name: str) -> Tower:
        return Tower(self._folder / ("base" if name == "_pretrained_" else name))

    def load_train_dataset(self, name: str) -> list[dict[str, Any]]:
        paths = sorted((self._folder / f"images of {name}").iterdir())
        return [{"image": Image.open(path), "label": 0} for path in paths]

    def load_processor(self) -> Any:
        return transformers.AutoImageProcessor.from_pretrained(self._folder / "base")


class Plain(RegMeanAlgorithmForCLIP):
    """Theirs, without heads that are made from texts, whose output is not used, and without an accelerator."""

    fabric = FABRIC

    def on_regmean_start(self) -> None:
        """No heads."""

    def compute_logits(self, module: Tower, batch: Any, task: str) -> Any:
        return module(batch[0])


class PlusPlus(RegMeanAlgorithmForCLIPPlusPlus):
    """Theirs, likewise, with layers that return a tensor, as they do in transformers 5, and with the names of settings
    that its base class has: its own replace them by what cannot be looked up."""

    fabric = FABRIC
    _config_mapping = RegMeanAlgorithmPlusPlus._config_mapping

    def on_regmean_start(self) -> None:
        """No heads."""

    def layer_batches_forward(self, layer: nn.Module, batches_input: list[Tensor]) -> Any:
        return [layer(batch, attention_mask=None).detach() for batch in batches_input]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, models a little away from it, and images for each."""
    config = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)
    torch.manual_seed(0)
    base = transformers.CLIPVisionModel(config).eval()
    kind = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 16, "width": 16}, "do_center_crop": False}
    for number, name in enumerate(("base", *TASKS)):
        if number:
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape)
            write_images(tmp_path / f"images of {name}", IMAGES, seed=number)
        base.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(kind))
    return tmp_path


def theirs(kind: Any, folder: Path, ratio: float) -> dict[str, Tensor]:
    algorithm = kind(
        num_regmean_examples=IMAGES,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=ratio,
        weight_transpose=True,
        dataloader_kwargs={"batch_size": 8, "num_workers": 0},
    )
    merged = algorithm.run(Pool(folder)).state_dict()
    return {name.removeprefix("vision_model."): tensor for name, tensor in merged.items()}


def ours(folder: Path, method: str, ratio: float, of_model: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    models = [{"model": str(folder / name), "parameters": of_model[name]} for name in TASKS]
    base = str(folder / "base")
    parameters = {"reduce_non_diagonal_ratio": ratio}
    config = {"merge_method": method, "base_model": base, "models": models, "parameters": parameters}
    pymerge.merge(config, folder / "out", device="cpu", progress=False)
    return load_file(folder / "out" / "model.safetensors")


def check(folder: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """All tensors of the blocks, as a share of what the merge moves."""
    base = {name: tensor.double() for name, tensor in load_file(folder / "base" / "model.safetensors").items()}
    compared = 0
    for name, tensor in wanted.items():
        (key,) = [each for each in found if each.endswith(name)] or [None]
        if ".layers." in name and key is not None:
            moved = (tensor.double() - base[key]).norm()
            off = (found[key].double() - tensor.double()).norm() / moved
            assert off <= 1e-3, (name, float(off))
            compared += 1
    assert compared == 3 * 16


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.1])
def test_regmean(folder: Path, ratio: float) -> None:
    files = {}
    for name in TASKS:
        file = folder / f"{name}.safetensors"
        settings = Settings(IMAGES, None, 512, 8, "float32", ())
        collect(str(folder / name), folder / f"images of {name}", file, settings, device="cpu", progress=False)
        files[name] = {"grams": str(file)}
    check(folder, ours(folder, "regmean", ratio, files), theirs(Plain, folder, ratio))


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.1])
def test_regmean_pp(folder: Path, ratio: float) -> None:
    data = {name: {"data": str(folder / f"images of {name}")} for name in TASKS}
    check(folder, ours(folder, "regmean_pp", ratio, data), theirs(PlusPlus, folder, ratio))
