"""Which worker carries out a step: native code where all of it can be had there, else PyTorch, for that step alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.common.devices import Device
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step
from pymerge.planner.workers import Target, worker_of
from tests.helpers.checkpoints import change, write_config, write_models

UP, NORM, COUNTER = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.counter"
SPARSE = {"weight": 0.5, "density": 0.5}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    base = {UP: torch.randn(24, 16, generator=generator), NORM: torch.ones(16), COUNTER: torch.arange(5)}
    return write_models(tmp_path, base)


def plan(models: Path, method: str, more: str = "", **parameters: Any) -> Plan:
    one = method in ("slerp", "nearswap", "arcee_fusion", "passthrough")
    return api.plan(write_config(models, method, experts=1 if one else 2, more=more, **parameters), device="cpu")


def workers(plan: Plan) -> Mapping[str, str]:
    return {step.name: step.worker for step in plan.steps}


def step(plan: Plan, name: str = UP) -> Step:
    return next(step for step in plan.steps if step.name == name)


STREAMED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {}),
    ("passthrough", {"scale": 0.5}),
    ("ties", {"weight": 0.5}),
    ("ties", SPARSE),
    ("ties", {**SPARSE, "scope": "model"}),
    ("dare_linear", SPARSE),
    ("della", SPARSE),
    ("breadcrumbs_ties", SPARSE),
    ("slerp", {"t": 0.5}),
    ("nuslerp", {"weight": 0.5}),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": 0.5}),
    ("karcher", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("nearswap", {"t": 0.1}),
    ("ram", {}),
    ("ramplus_tl", {}),
    ("sce", {"select_topk": 0.5}),
    ("arcee_fusion", {}),
]


@pytest.mark.parametrize(("method", "parameters"), STREAMED, ids=str)
def test_methods_whose_ops_are_all_in_native_code(models: Path, method: str, parameters: dict[str, Any]) -> None:
    found = plan(models, method, **parameters)
    assert set(workers(found).values()) == {"native"}
    assert not found.needs_torch


@pytest.mark.parametrize(
    "method", ["wudi", "wudi_flow", "ace", "tact", "weir", "tsv_m", "dc_merge", "lore", "doge", "iso_c"]
)
def test_solvers_need_pytorch_for_linear_weights_alone(models: Path, method: str) -> None:
    found = plan(models, method)
    assert workers(found) == {UP: "torch", NORM: "native", COUNTER: "native"}
    assert found.needs_torch


@pytest.mark.parametrize("folders", [["base"], ["e1"], ["base", "e0", "e1"]], ids=str)
@pytest.mark.parametrize(("method", "parameters"), STREAMED, ids=str)
def test_float64_needs_no_pytorch(models: Path, folders: list[str], method: str, parameters: dict[str, Any]) -> None:
    for folder in folders:
        change(models / folder, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    found = plan(models, method, **parameters)
    assert set(workers(found).values()) == {"native"}
    assert all((entry.dtype == "F64") == (entry.file.parent.name in folders) for entry in step(found, NORM).inputs)


@pytest.mark.parametrize(("method", "parameters"), STREAMED, ids=str)
def test_a_result_of_float64_needs_no_pytorch(models: Path, method: str, parameters: dict[str, Any]) -> None:
    found = plan(models, method, more="out_dtype: float64", **parameters)
    assert (step(found).dtype, set(workers(found).values())) == ("F64", {"native"})


@pytest.mark.parametrize(
    ("method", "parameters", "passes"),
    [
        ("ties", SPARSE, 5),
        ("breadcrumbs", {**SPARSE, "rescale": True}, 6),
        ("sce", {"select_topk": 0.5}, 6),
        ("arcee_fusion", {}, 5),
        ("della", SPARSE, 2),
        ("karcher", {}, 2),
    ],
)
def test_keys_of_float64_take_twice_the_passes(
    tmp_path: Path, method: str, parameters: dict[str, Any], passes: int
) -> None:
    """Where a tensor is in several pieces; its state and scratch are what float64 takes."""
    base = {UP: torch.zeros(3000, 1000), NORM: torch.ones(16)}
    write_models(tmp_path, base)
    narrow = step(plan(tmp_path, method, **parameters))
    for folder in ("base", "e0", "e1"):
        change(tmp_path / folder, lambda tensors: tensors.update({UP: tensors[UP].double()}))
    wide = step(plan(tmp_path, method, **parameters))
    selects = method not in ("della", "karcher")
    assert (len(wide.pieces), wide.passes, narrow.passes) == (2, passes, passes - 2 * selects)
    assert wide.footprint(wide.pieces[0]).scratch >= narrow.footprint(narrow.pieces[0]).scratch


def test_elements_that_lie_apart_need_pytorch(models: Path) -> None:
    found = plan(models, "linear")
    up = step(found)
    strided = replace(up, experts=(up.experts[0], replace(up.experts[1], strides=(1, 24))))
    assert worker_of(strided, found.target) == "torch"
    assert worker_of(up, found.target) == "native"


@pytest.mark.parametrize(("method", "parameters"), STREAMED, ids=str)
def test_8_bit_floats_need_no_pytorch(models: Path, method: str, parameters: dict[str, Any]) -> None:
    for folder in ("base", "e0"):
        change(models / folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))
    found = plan(models, method, **parameters)
    assert set(workers(found).values()) == {"native"}
    assert "F8_E4M3" in {entry.dtype for entry in step(found, NORM).inputs}


@pytest.mark.parametrize("more", ["", "out_dtype: bfloat16", "out_dtype: bfloat16\nallow_nonfinite: true"])
def test_copies_as_they_are_and_in_another_dtype(models: Path, more: str) -> None:
    assert set(workers(plan(models, "passthrough", more=more, scale=1.0)).values()) == {"native"}


@pytest.mark.parametrize(
    "target",
    [
        Target(backend="reference"),
        Target(backend="triton"),
        Target(Device("cuda", 0)),
        Target(Device("cuda", 0), "cuda"),
        Target(native=False),
    ],
    ids=str,
)
def test_other_backends_and_devices_take_tensors_of_pytorch(models: Path, target: Target) -> None:
    assert not target.takes_arrays
    assert worker_of(step(plan(models, "linear")), target) == "torch"


def test_a_backend_that_is_named_native(models: Path) -> None:
    config = write_config(models, "ties", **SPARSE)
    assert set(workers(api.plan(config, device="cpu", backend="native")).values()) == {"native"}
    reference = api.plan(config, device="cpu", backend="reference")
    assert set(workers(reference).values()) == {"torch"}
    assert reference.target.backend == "reference"


def test_threads_are_those_of_the_machine_or_of_omp_num_threads(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(models, "linear")
    for given, expected in (("6", 6), ("3,2", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert api.plan(config, device="cpu").target.threads == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert api.plan(config, device="cpu").target.threads >= 1


def test_versions_of_pytorch_are_part_of_an_identity_where_it_takes_part(models: Path) -> None:
    assert "torch version" not in plan(models, "ties", **SPARSE).identity("x86")
    assert "torch version" in plan(models, "wudi").identity("x86")
