"""Adapters in PEFT's form, of random factors, for a Llama-shaped base; and the configs that merge them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness.synthetic import SIZES_OF_DELTAS, generator

DTYPE = torch.float32  # as PEFT trains and saves factors
KEY = "base_model.model."

Shapes = Mapping[str, tuple[int, ...]]


def factors(
    d_out: int, d_in: int, rank: int, size: float, *key: object, dtype: torch.dtype = DTYPE
) -> tuple[Tensor, Tensor]:
    """Random B, d_out x rank, and A, rank x d_in, with B A of the norm `size` times that of a weight of std 0.02."""
    left = torch.randn(d_out, rank, generator=generator(*key, "left"))
    right = torch.randn(rank, d_in, generator=generator(*key, "right"))
    squared = float(((left.mT @ left) * (right @ right.mT)).sum())
    scale = size * 0.02 * (d_out * d_in / squared) ** 0.5
    return (left * (scale * d_in**0.5)).to(dtype), (right / d_in**0.5).to(dtype)


def pairs(shapes: Shapes, rank: int, number: int) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of an adapter, on all linear layers of a model with these tensors: by the weight's name."""
    size = SIZES_OF_DELTAS[(number - 1) % len(SIZES_OF_DELTAS)]
    linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    return {name: factors(shape[0], shape[1], rank, size, name, number) for name, shape in linear.items()}


def make(shapes: Shapes, base: Path, rank: int, number: int) -> Path:
    """The folder of an adapter beside its base, made if it is not there; its scale is 1."""
    folder = base.with_name(f"{base.name}-lora-{rank}-{number}")
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored: dict[str, Tensor] = {}
    for name, (B, A) in pairs(shapes, rank, number).items():
        module = KEY + name.removesuffix(".weight")
        stored |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    save_file(stored, partial / "adapter_model.safetensors", {"format": "pt"})
    (partial / "adapter_config.json").write_text(_config(shapes, base, rank))
    partial.rename(folder)
    return folder


def _config(shapes: Shapes, base: Path, rank: int) -> str:
    modules = sorted({name.split(".")[-2] for name in shapes if name.endswith("_proj.weight")})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
        "inference_mode": True,
    }
    return json.dumps(fields, indent=1) + "\n"


# Of the methods that are timed, what a config says beside models and dtype.
PARAMETERS: Mapping[str, Mapping[str, Any]] = {"task_arithmetic": {"lambda": 0.4}}
CORE = ("wudi_flow", "ace", "tsv_m", "iso_c")


def config(method: str, base: Path, models: Sequence[Path], *, adapters: bool = True) -> str:
    """The YAML that pymerge and mergekit read alike; models are adapters of the base, or whole."""
    weight = {"parameters": {"weight": 1.0}} if method == "task_arithmetic" else {}
    content = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{model}" if adapters else str(model), **weight} for model in models],
        "parameters": dict(PARAMETERS.get(method, {})),
        "dtype": "bfloat16",
    }
    return json.dumps(content, indent=1) + "\n"  # which is YAML, too


def tensor_of(folder: Path, name: str) -> Tensor:
    """A tensor of a model or an adapter."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in set(opened.keys()):
                found: Tensor = opened.get_tensor(name)
                return found
    raise SystemExit(f"{folder} has no tensor {name}")
