"""Adapters of given products of factors, in PEFT's form; and the models that they make, as sums."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.adapters import Tensors, write_adapter

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # left and right of a tensor as it is stored; of a stack, stacks


def write_products(folder: Path, base: Path, products: Pairs, dora: bool = False) -> Path:
    """A folder with an adapter that adds left @ right to some tensors of a base."""
    stored = {}
    for name, (left, right) in products.items():
        module = name.removesuffix(".weight") if left.ndim == 2 else name.rpartition(".")[0]
        key = f"base_model.model.{module}"
        if left.ndim == 3:  # rows e * r + k of A, columns k * E + e of B
            left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
        stored |= {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left}
        if dora:
            stored[f"{key}.lora_magnitude_vector"] = torch.ones(len(left))
    rank = max(left.shape[-1] for left, _ in products.values())
    modules = sorted({name.split(".")[-2] for name in products})
    said = {"r": rank, "lora_alpha": rank, "target_modules": modules, "use_dora": dora}
    return write_adapter(folder, stored, base_model_name_or_path=str(base), **said)


def moved(base: Tensors, products: Pairs) -> Tensors:
    """The sums, in float64."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, (left, right) in products.items():
        found[name] = found[name] + left.double() @ right.double()
    return found
