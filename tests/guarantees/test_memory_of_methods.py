"""Memory that each method really holds, of weights in several forms: within the least limit that the plan allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.methods import METHODS
from tests.guarantees.test_memory import BESIDE_TENSORS, measured
from tests.helpers.checkpoints import write_config, write_models
from tests.helpers.collected import write_grams

FORMS: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
    "stack": ("model.layers.0.mlp.experts.down_proj", (6, 640, 640), torch.bfloat16),
    "fused": ("model.layers.0.mlp.experts.gate_up_proj", (6, 640, 640), torch.bfloat16),
    "float64": ("model.layers.0.mlp.up_proj.weight", (512, 1024), torch.float64),
    "wide": ("model.layers.0.mlp.down_proj.weight", (512, 2048), torch.float32),
    "tall": ("model.layers.0.mlp.up_proj.weight", (2048, 512), torch.bfloat16),
    "long": ("model.layers.0.mlp.up_proj.weight", (1600, 800), torch.bfloat16),  # polar factors by products
    "kernel": ("stem.0.weight", (512, 128, 3, 3), torch.float32),
    "table": ("model.embed_tokens.weight", (40_000, 256), torch.bfloat16),
}
KNOWN = {"density": 0.5, "weight": 0.5, "epsilon": 0.1, "gamma": 0.01, "t": 0.3, "select_topk": 0.5, "iterations": 2}


def write(folder: Path, method: str, form: str, **more: Any) -> Path:
    """Write the models of a form, and small ones, which load what the method needs."""
    name, shape, dtype = FORMS[form]
    most = METHODS[method].most_experts
    parameters = {
        each.name: KNOWN[each.name] for each in METHODS[method].parameters if each.name in KNOWN and not each.choices
    } | more
    for place, size in ((folder / "small", tuple(min(each, 24) for each in shape)), (folder, shape)):
        write_models(place, {name: (0.1 * torch.randn(size)).to(dtype)})
        if METHODS[method].needs_grams:
            parameters["grams"] = write_grams(place / "grams.safetensors", {name: torch.empty(size)})
        write_config(place, method, experts=2 if most is None else most, **parameters)
    return folder


def check(folder: Path) -> None:
    steps = api.plan(folder / "merge.yml", device="cpu").steps
    least = max(2**20, *(step.footprint(step.smallest).peak for step in steps))
    peak = measured(folder, memory=least)
    assert peak.planned <= least
    assert peak.grown <= 1.1 * least + BESIDE_TENSORS


@pytest.mark.parametrize(
    ("method", "form", "parameters"),
    [
        ("wudi", "stack", {}),  # its advice on deltas looks at rows: of a stack at matrices
        ("wudi_flow", "float64", {}),
        ("wudi_flow", "wide", {"precision": "float64"}),
        ("linear", "table", {}),
        ("iso_c", "long", {}),
        ("tsv_m", "long", {}),
        ("weir", "tall", {}),
        ("weir", "kernel", {}),
        ("ace", "long", {"gamma_threshold": -1.0}),  # refined: by matrices of d_in x d_in, and by products of rows
        ("ace", "wide", {"gamma_threshold": -1.0}),
        ("ace", "wide", {"gamma_threshold": -1.0, "variant": "paper"}),
    ],
)
def test_the_least_limit_is_kept(tmp_path: Path, method: str, form: str, parameters: dict[str, Any]) -> None:
    check(write(tmp_path, method, form, **parameters))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].needs_data])
def test_every_method_keeps_the_least_limit(tmp_path: Path, method: str, form: str) -> None:
    check(write(tmp_path, method, form))
