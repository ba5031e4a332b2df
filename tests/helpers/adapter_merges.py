"""Merges of adapters by configs: two adapters of a small base, and the models that these make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pymerge import api
from pymerge.errors import ConfigError, PlanError
from pymerge.planner.plan import Plan
from tests.helpers.adapters import factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model

MODULES = [f"model.layers.{block}.{name}" for block in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
STEM = "base_model.model."
UP, EMBEDDING, HEAD = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


def write_adapted_models(folder: Path) -> Path:
    """A base, two adapters of it, and the models that these make of it, as float32 files."""
    tensors = llama(hidden=24, inner=40)
    base = write_model(folder / "base", tensors, config=llama_config(tensors))
    for number in range(2):
        found = factors(tensors, MODULES[number:], rank=3, seed=number)
        adapter = write_adapter(folder / f"a{number}", found, r=3, lora_alpha=6)
        write_model(folder / f"e{number}", read_all(opened(base, adapter)), config=llama_config(tensors))
    return folder


def config(folder: Path, *models: Any, method: str = "task_arithmetic", base: str | None = "base", **more: Any) -> Path:
    said: dict[str, Any] = {"merge_method": method, **({"base_model": base} if base else {}), **more}
    said.setdefault("parameters", {"weight": 0.5})
    said["models"] = [model if isinstance(model, dict) and "model" in model else {"model": model} for model in models]
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(said))
    return path


def planned(path: Path, **limits: Any) -> Plan:
    return api.plan(path, device="cpu", **limits)


def merged(path: Path, out: str = "out", **limits: Any) -> Tensors:
    api.merge(path, path.parent / out, device="cpu", progress=False, overwrite=True, **limits)
    return load_file(path.parent / out / "model.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises((PlanError, ConfigError)) as caught:
        planned(path)
    assert not (path.parent / "out").exists()
    return str(caught.value)


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def near(one: Tensors, other: Tensors) -> None:
    """Equal but for the order of sums, in which products of adapters come first."""
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-7)
