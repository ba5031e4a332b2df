"""Adapters on disk as PEFT writes them, made by hand, and what they are to give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pymerge.adapters.apply import adapted
from pymerge.adapters.folder import open_adapter
from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.reader import Reader

Tensors = dict[str, Tensor]


def factors(base: Mapping[str, Tensor], modules: list[str], rank: int = 4, seed: int = 0) -> Tensors:
    """Random lora_A and lora_B of linear layers, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    return found


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], *, form: str = "safetensors", **config: Any) -> Path:
    """Write an adapter's folder; `config` is what adapter_config.json says beside its type."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    else:
        torch.save(dict(tensors), folder / f"adapter_model.{form}")
    return folder


def opened(base: Path, adapter: Path) -> Checkpoint:
    """An adapter on its base."""
    return adapted(open_checkpoint(base), open_adapter(adapter))


def read_all(checkpoint: Checkpoint) -> Tensors:
    """All tensors of an adapter on its base, or of a model."""
    stamps = checkpoint.stamps | (checkpoint.base.stamps if checkpoint.base else {})
    with Reader(stamps) as reader:
        return {name: reader.read(entry) for name, entry in checkpoint.tensors.items()}


def applied(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], scale: float) -> Tensors:
    """The base with s B A added wherever an adapter has factors, computed in float64."""
    found = {name: tensor.double().clone() for name, tensor in base.items()}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] += scale * (b.double() @ a.double())
    return found
