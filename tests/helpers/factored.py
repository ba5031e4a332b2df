"""Adapters of given products of factors, in PEFT's form; and the models that they make, as sums."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import Tensors

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # left and right of a tensor as it is stored; of a stack, stacks


def write_adapter(folder: Path, base: Path, factors: Pairs, dora: bool = False) -> Path:
    """A folder with an adapter that adds left @ right to some tensors of a base."""
    folder.mkdir(parents=True)
    stored = {}
    for name, (left, right) in factors.items():
        module = name.removesuffix(".weight") if left.ndim == 2 else name.rpartition(".")[0]
        key = f"base_model.model.{module}"
        if left.ndim == 3:  # rows e * r + k of A, columns k * E + e of B
            left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
        stored |= {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left}
        if dora:
            stored[f"{key}.lora_magnitude_vector"] = torch.ones(len(left))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "adapter_model.safetensors")
    plain = {name: left.shape[-1] for name, (left, _) in factors.items()}
    rank = max(plain.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-2] for name in factors}),
        "use_dora": dora,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def moved(base: Tensors, factors: Pairs) -> Tensors:
    """The sums, in float64."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, (left, right) in factors.items():
        found[name] = found[name] + left.double() @ right.double()
    return found
