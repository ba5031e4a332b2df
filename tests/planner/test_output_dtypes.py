"""Dtypes of outputs: what a 16-bit model keeps in float32, and what config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.planner.output_dtypes import with_dtype
from tests.helpers.checkpoints import Tensors, fine_tuned, load_output, write_config, write_model, write_models

UP, ROUTER = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate.e_score_correction_bias"
STATE, NORM = "model.layers.0.mixer.A_log", "model.norm.weight"
WIDE = {ROUTER, STATE, NORM}


def tensors(dtype: torch.dtype = torch.bfloat16, wide: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        UP: torch.randn(24, 16, generator=generator).to(dtype),
        ROUTER: (10 + 0.05 * torch.randn(64, generator=generator)).to(wide),
        STATE: torch.log(torch.arange(1.0, 9.0)).to(wide),
        NORM: torch.rand(16, generator=generator).to(wide),
    }


def merged(folder: Path, method: str = "task_arithmetic", more: str = "", **options: Any) -> Tensors:
    api.merge(write_config(folder, method, more=more), folder / "out", progress=False, overwrite=True, **options)
    return load_output(folder / "out")


def dtypes(found: Tensors) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in found.items()}


@pytest.mark.parametrize("more", ["dtype: bfloat16", "out_dtype: float16", "dtype: float32\nout_dtype: bfloat16"])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "wudi_flow"])
def test_what_a_16_bit_model_keeps_in_float32_stays_so(tmp_path: Path, method: str, more: str) -> None:
    base = tensors()
    write_models(tmp_path, base)
    found = merged(tmp_path, method, more)
    wanted = torch.float16 if "float16" in more.replace("bfloat16", "") else torch.bfloat16
    assert dtypes(found) == {UP: wanted} | dict.fromkeys(WIDE, torch.float32)
    experts = [load_output(tmp_path / name) for name in ("e0", "e1")]
    for name in WIDE:
        mean = sum(expert[name].double() for expert in experts) / 2
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)
    (warning,) = api.plan(tmp_path / "merge.yml").warnings
    assert warning.startswith("3 tensors: ")
    assert all(name in warning for name in WIDE)
    assert f"kept as float32, as in {tmp_path / 'base'}" in warning
    assert "keep_float32: false" in warning


def test_on_request_all_is_written_alike(tmp_path: Path) -> None:
    write_models(tmp_path, tensors())
    assert set(dtypes(merged(tmp_path, more="dtype: bfloat16\nkeep_float32: false")).values()) == {torch.bfloat16}
    assert api.plan(tmp_path / "merge.yml").warnings == ()
    assert dtypes(merged(tmp_path, dtype="float16")) == {UP: torch.float16} | dict.fromkeys(WIDE, torch.float32)


def test_a_model_in_float32_is_narrowed_as_a_whole(tmp_path: Path) -> None:
    write_models(tmp_path, tensors(torch.float32))
    assert set(dtypes(merged(tmp_path, more="dtype: bfloat16")).values()) == {torch.bfloat16}
    base = tensors(torch.float32) | {"model.layers.0.small.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    write_models(tmp_path, base)  # most of it in float32
    assert set(dtypes(merged(tmp_path, more="dtype: bfloat16")).values()) == {torch.bfloat16}


def test_float64_and_float8(tmp_path: Path) -> None:
    write_models(tmp_path, tensors(torch.bfloat16, torch.float64))
    kept = dict.fromkeys(WIDE, torch.float64)
    assert dtypes(merged(tmp_path, more="dtype: bfloat16")) == {UP: torch.bfloat16} | kept
    assert dtypes(merged(tmp_path, more="dtype: float32")) == {UP: torch.float32} | kept
    base = tensors()
    write_model(tmp_path / "base", base | {UP: base[UP].to(torch.float8_e4m3fn)})
    for number in range(2):
        write_model(tmp_path / f"e{number}", fine_tuned(base, number))
    assert dtypes(merged(tmp_path, more="dtype: float16")) == {UP: torch.float16} | dict.fromkeys(WIDE, torch.float32)


def test_a_wider_output_is_wider_altogether(tmp_path: Path) -> None:
    write_models(tmp_path, tensors())
    assert set(dtypes(merged(tmp_path, more="dtype: float64")).values()) == {torch.float64}
    assert api.plan(tmp_path / "merge.yml").warnings == ()


def test_the_base_decides_not_an_expert(tmp_path: Path) -> None:
    base = tensors()
    write_models(tmp_path, base)
    write_model(tmp_path / "e1", {name: tensor.bfloat16() for name, tensor in fine_tuned(base, 1).items()})
    assert dtypes(merged(tmp_path, more="dtype: bfloat16"))[ROUTER] == torch.float32
    write_model(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in base.items()})
    assert dtypes(merged(tmp_path, more="dtype: bfloat16"))[ROUTER] == torch.bfloat16


def test_dtypes_of_inner_configs_follow(tmp_path: Path) -> None:
    config = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "dtype": "torch.float32"},
        "vision_config": {"dtype": "float16", "inner": {"dtype": None, "torch_dtype": "bfloat16"}},
        "quantizer": {"dtype": "auto"},
    }
    write_models(tmp_path, tensors(), config={"model_type": "x", **config})
    merged(tmp_path, more="dtype: bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "model_type": "x",
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        "vision_config": {"dtype": "bfloat16", "inner": {"dtype": None, "torch_dtype": "bfloat16"}},
        "quantizer": {"dtype": "auto"},
    }
    merged(tmp_path)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x", **config}


def test_8_bit_floats_in_inner_configs() -> None:
    config = {
        "torch_dtype": "float8_e4m3fn",
        "text_config": {"dtype": "float8_e5m2"},
        "vision_config": {"dtype": "float16"},
    }
    assert with_dtype(config, None) == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {"dtype": "float16"},
    }
    assert with_dtype({"torch_dtype": None}, "float16") == {"torch_dtype": "float16"}
