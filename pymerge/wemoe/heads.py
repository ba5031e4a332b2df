"""Heads of tasks: classifiers that belong to no merge, from experts' checkpoints or from files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pymerge.architecture.words import is_head_name
from pymerge.checkpoint.checkpoint import open_checkpoint, read_header
from pymerge.checkpoint.reader import Reader
from pymerge.errors import CheckpointError
from pymerge.wemoe.load import model_names

# Where transformers' models without a head put their features, the first that is there.
_FEATURES = ("image_embeds", "text_embeds", "pooler_output")


@dataclass(frozen=True)
class FeatureHead:
    """From features (B x d) to logits (B x classes): linear, or with `scale` the scaled cosine of CLIP's kind."""

    weight: Tensor
    bias: Tensor | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        features = features.to(torch.float32)
        if self.mean is not None:
            features = features - self.mean
        if self.scale is None:
            return F.linear(features, self.weight, self.bias)
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def read_feature_head(path: Path, device: torch.device) -> FeatureHead:
    """Read a head from a .safetensors file.

    It holds `weight` (classes x d) and may hold `mean` (d), which is subtracted from the features, and either `bias`
    (classes) or `scale` (one number): then logits are scale times the cosine of features and rows of the weight.
    """
    entries = read_header(path).entries
    weight = entries.get("weight")
    if weight is None or len(weight.shape) != 2:
        raise CheckpointError(f"{path}: has no weight of classes x features; write one under this name")
    classes, width = weight.shape
    shapes: dict[str, list[tuple[int, ...]]]
    shapes = {"weight": [(classes, width)], "bias": [(classes,)], "mean": [(width,)], "scale": [(), (1,)]}
    for name, entry in entries.items():
        if tuple(entry.shape) not in shapes.get(name, []):
            wanted = " or ".join(str(list(shape)) for shape in shapes[name]) if name in shapes else "no such tensor"
            raise CheckpointError(f"{path}: {name!r} is {list(entry.shape)}, expected {wanted}; correct the file")
    if "bias" in entries and "scale" in entries:
        raise CheckpointError(f"{path}: has bias and scale; leave one out: cosines have no bias")
    return FeatureHead(**{name: tensor.to(device, torch.float32) for name, tensor in load_file(path).items()})


def read_checkpoint_head(path: Path, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The head's tensors of an expert's checkpoint, by the names of `model`, which is of the same architecture."""
    checkpoint = open_checkpoint(path)
    names = model_names(model, [name for name in checkpoint.tensors if is_head_name(name)], path, partial=True)
    if not names:
        raise CheckpointError(
            f"{path}: no tensor is the head of a {type(model).__name__} (looked for classifier, score, head, ...); "
            "give a .safetensors file with the head's weight"
        )
    with Reader(checkpoint.stamps) as reader:
        return {
            own: reader.read(checkpoint.tensors[name]).to(device, model.get_parameter(own).dtype)
            for name, own in names.items()
        }


def logits_of(heads: Mapping[str, FeatureHead]) -> Callable[[str, Any], Tensor]:
    """`logits` for `adapt`: through the task's head where it has one, else what the model gave."""

    def logits(task: str, output: Any) -> Tensor:
        head = heads.get(task)
        if head is None:
            found: Tensor = getattr(output, "logits", output)
            return found
        return head(features_of(task, output))

    return logits


def features_of(task: str, output: Any) -> Tensor:
    """Features (B x d) in a model's output."""
    if isinstance(output, Tensor):
        return output
    for name in _FEATURES:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise CheckpointError(
        f"the head of task {task!r} needs features, and a {type(output).__name__} has none of {', '.join(_FEATURES)}; "
        "give the expert's checkpoint as its head, or none"
    )
