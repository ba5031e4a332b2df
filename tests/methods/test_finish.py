"""Passes behind methods, against float64 forms on what the method alone adds to the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.architecture.roles import Kind, Rule
from pymerge.backends.runner import Runner
from pymerge.engine.recheck import recheck
from pymerge.errors import ArgumentError, ConfigError, PlanError
from pymerge.methods import METHODS
from pymerge.methods.finish import Finish, scales
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.checkpoints import llama, load_output, write_config, write_models
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import boosted, calibrated
from tests.helpers.solvers import merged_delta

# Of each kind of action: a sum, an elementwise op, passes over pieces, matrices.
KINDS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 1.0, "density": 0.5},
    "ram": {},
    "model_stock": {},
    "della": {"weight": 1.0, "density": 0.6},
    "wudi_flow": {"scale": 0.8},
    "tsv_m": {},
}
SHAPES = [(7, 9, 3), (33, 20, 4), (20, 48, 2), (1, 16, 3), (16, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", KINDS)
def test_a_pass_is_its_formula_on_what_the_method_adds(method: str, shape: tuple[int, int, int], dtype: Any) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    wide = [tensor.double() for tensor in (base, *experts)]
    taus = [as_float64(tensor) for tensor in wide]
    X = merged_delta(wide[0], wide[1:], method, **KINDS[method])
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4  # solvers find X in float32 there
    for given, expected in [
        ({"calibrate": "svc"}, calibrated(X, taus[0], taus[1:])),
        ({"calibrate": "svc", "calibrate_alpha": 0.25}, calibrated(X, taus[0], taus[1:], 0.25)),
        ({"boost": 0.3}, boosted(X, 0.3)),
        ({"boost": 0.3, "calibrate": "svc"}, boosted(calibrated(X, taus[0], taus[1:]), 0.3)),
    ]:
        found = merged_delta(base, experts, method, **KINDS[method], **given)
        if np.any(expected):
            assert relative_error(found, expected) < tolerance
        else:
            assert not found.any()


def test_one_task_equal_tasks_and_untouched_ones() -> None:
    base, experts = make_weights(12, 10, 1, dtype=torch.float64)
    tau = as_float64(experts[0] - base)
    assert relative_error(merged_delta(base, experts, "task_arithmetic", calibrate="svc"), tau) < 1e-9
    assert relative_error(merged_delta(base, experts * 3, "task_arithmetic", calibrate="svc"), tau) < 1e-9
    for given in ({"calibrate": "svc"}, {"boost": 0.01}):
        assert torch.equal(pymerge.merge_tensors(base, [base, base], "ties", density=0.5, **given), base)
    experts[0][0, 0] = torch.inf
    values = METHODS["ties"].defaults(1)
    action = Finish(METHODS["ties"].action("x", True, values, 1), boost=0.1, calibrate=1.0)
    assert not action.run(Runner(), base, experts, "F32").isfinite().all()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "tsv_m"])
def test_layouts_are_of_the_tensor_for_the_method_and_of_its_matrices_for_the_pass(method: str) -> None:
    """Masks and random numbers are those of the tensor as it is stored, whatever is calibrated."""
    generator = torch.Generator().manual_seed(2)
    given = {"density": 0.5} if method != "tsv_m" else {}
    stack = [torch.randn(3, 8, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    base, *experts = stack
    X = pymerge.merge_tensors(base, experts, method, **given) - base
    merged = pymerge.merge_tensors(base, experts, method, **given, calibrate="svc") - base
    for matrix in range(3):
        own = [as_float64(tensor[matrix]) for tensor in stack]
        assert relative_error(as_float64(merged[matrix]), calibrated(as_float64(X[matrix]), own[0], own[1:])) < 1e-9
    base, experts = stack[0][0], [tensor[0] for tensor in stack[1:]]
    X = as_float64(pymerge.merge_tensors(base, experts, method, in_axis=0, **given) - base)
    turned = calibrated(X.T, as_float64(base).T, [as_float64(tensor).T for tensor in experts])
    found = pymerge.merge_tensors(base, experts, method, in_axis=0, **given, calibrate="svc") - base
    assert relative_error(as_float64(found), turned.T) < 1e-9


def test_the_parts_of_a_weight_are_calibrated_one_by_one() -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"
    base, experts = make_weights(24, 10, 3, dtype=torch.float64)
    states = [{name: expert} for expert in experts]
    rules = [Rule(name, Kind.LINEAR, split=2)]
    found = pymerge.merge_state_dicts({name: base}, states, "task_arithmetic", rules=rules, calibrate="svc")[name]
    for rows in (slice(0, 12), slice(12, 24)):
        own = pymerge.merge_tensors(base[rows], [each[rows] for each in experts], "task_arithmetic", calibrate="svc")
        torch.testing.assert_close(found[rows], own, rtol=1e-12, atol=0)


PASSES: list[dict[str, Any]] = [
    {"calibrate": "svc"},
    {"boost": 0.05, "calibrate": "svc", "calibrate_alpha": 0.5},
    {"layer_scale": {"lines": [0.5, 1.0]}},
    {"layer_scale": {"power": 2}},
    {"calibrate": "svc", "layer_scale": {"power": -0.5}},
]


@pytest.mark.parametrize("given", PASSES, ids=str)
@pytest.mark.parametrize("method", KINDS)
def test_files_give_what_tensors_in_memory_give(tmp_path: Path, method: str, given: dict[str, Any]) -> None:
    check_files_are_memory(tmp_path, method, **KINDS[method], **given)


def models(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A model of three blocks, and experts that move each of them by another amount."""
    base = {name: tensor.to(dtype) for name, tensor in llama(blocks=3).items()}
    generator = torch.Generator().manual_seed(8)
    experts = []
    for _ in range(2):
        moved = {}
        for number, (name, tensor) in enumerate(base.items()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            moved[name] = (tensor + 1e-3 * (1 + number % 5) * noise).to(dtype)
        experts.append(moved)
    return base, experts


def added(base: dict[str, Tensor], merged: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: merged[name].double() - base[name].double() for name in base}


@pytest.mark.parametrize("method", KINDS)
def test_lines_scale_every_tensor_by_its_block(method: str) -> None:
    base, experts = models()
    plain = added(base, pymerge.merge_state_dicts(base, experts, method, **KINDS[method]))
    given = {"layer_scale": {"lines": [0.4, 1.2]}}
    found = added(base, pymerge.merge_state_dicts(base, experts, method, **KINDS[method], **given))
    for name, X in plain.items():
        block = int(name.split(".")[2]) if ".layers." in name else 0
        torch.testing.assert_close(found[name], (0.4 + 1.2 * block / 2) * X, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("power", [2.0, -1.0, 0.5])
def test_a_power_scales_layers_by_their_norms_and_keeps_the_sum_of_squares(power: float) -> None:
    base, experts = models()
    plain = added(base, pymerge.merge_state_dicts(base, experts, "task_arithmetic"))
    found = added(base, pymerge.merge_state_dicts(base, experts, "task_arithmetic", layer_scale={"power": power}))
    kinds: dict[str, list[str]] = {}
    for name in base:
        if "_proj" in name:
            kinds.setdefault(name.replace(f".{name.split('.')[2]}.", ".*."), []).append(name)
        else:
            torch.testing.assert_close(found[name], plain[name], rtol=0, atol=0)
    assert len(kinds) == 7
    for names in kinds.values():
        norms = np.array([float(plain[name].norm()) for name in names])
        factors = (norms / norms.mean()) ** power
        factors *= np.sqrt((norms**2).sum() / ((factors * norms) ** 2).sum())
        for name, factor in zip(names, factors, strict=True):
            torch.testing.assert_close(found[name], factor * plain[name], rtol=1e-9, atol=1e-15)


def test_scales_of_layers_that_are_alone_untouched_or_far_apart() -> None:
    layer = Finish(METHODS["ties"].action("x", True, METHODS["ties"].defaults(1), 1), power=2.0, kind="k")
    assert scales({"a": (layer, 9.0)}) == {"a": 1.0}
    assert scales({"a": (layer, 0.0), "b": (layer, 4.0)}) == {"a": 1.0, "b": 1.0}
    steep = Finish(layer.inner, power=-300.0, kind="k")
    found = scales({"a": (steep, 1e-12), "b": (steep, 1.0)})
    assert found["b"] == 0.0
    assert found["a"] == pytest.approx(1e6, rel=1e-6)


def test_norms_stay_for_a_run_that_goes_on_and_are_in_the_plan(tmp_path: Path) -> None:
    base, _ = models(torch.float32)
    write_models(tmp_path, base)
    plain = pymerge.plan(write_config(tmp_path, "task_arithmetic", weight=1.0), device="cpu")
    config = write_config(tmp_path, "task_arithmetic", weight=1.0, layer_scale={"power": 1})
    plan = pymerge.plan(config, device="cpu", max_shard_size="4KB")
    linear = sum(step.bytes_input for step in plan.steps if "_proj" in step.name)
    assert plan.bytes_read == plain.bytes_read + linear
    for number in range(1, 3):
        pymerge.run(plan, tmp_path / "parts", progress=False, part=(number, 2))
        assert (tmp_path / "parts" / ".pymerge" / "norms.json").exists()
    pymerge.finalize(plan, tmp_path / "parts", progress=False)
    assert not (tmp_path / "parts" / ".pymerge").exists()
    pymerge.run(plan, tmp_path / "whole", progress=False)
    one, other = load_output(tmp_path / "parts"), load_output(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in base)
    pymerge.merge(config, tmp_path / "again", device="cpu", progress=False)
    assert recheck(tmp_path / "again").problems == []
    labels = {step.action.label for step in plan.steps if "_proj" in step.name}
    assert labels == {"add task vectors + layer scale"}


@pytest.mark.parametrize("given", PASSES, ids=str)
def test_a_merger_gives_the_same(given: dict[str, Any]) -> None:
    base, experts = models(torch.float32)
    expected = pymerge.merge_state_dicts(base, experts, "ties", density=0.5, **given)
    found = pymerge.Merger(base, experts, "ties", density=0.5, **given).merge()
    assert [name for name in base if not torch.equal(found[name], expected[name])] == []


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    base, experts = make_weights(6, 5, 2)
    with pytest.raises(ArgumentError, match=r"'calibrate' is for what a merge adds to a base, and 'linear' has none"):
        pymerge.merge_tensors(base, experts, "linear", calibrate="svc")
    with pytest.raises(ArgumentError, match="layer_scale needs the layers of a whole model"):
        pymerge.merge_tensors(base, experts, "ties", layer_scale={"power": 1})
    with pytest.raises(ArgumentError, match="'calibrate_alpha' is that of 'calibrate: svc'"):
        pymerge.merge_tensors(base, experts, "ties", calibrate_alpha=0.5)
    for wrong in ({"power": [1, 2]}, {"lines": 1}, {"lines": [1, float("nan")]}, {"squares": 1}, "power", [2], {}):
        with pytest.raises(ArgumentError, match=r"'layer_scale' is .*; it must be none, \{power: p\} or \{lines"):
            pymerge.merge_tensors(base, experts, "ties", layer_scale=wrong)
    write_models(tmp_path, llama())
    config = write_config(tmp_path, "ties", weight=1.0, density=0.5, scope="model", boost=0.01)
    together = "'boost' works on each tensor, and scope: model on all of them together"
    with pytest.raises(PlanError, match=f"{together}; give scope: tensor, or delete 'boost'"):
        pymerge.plan(config, device="cpu")
    with pytest.raises(ConfigError, match=r"parameter 'boost' is 2; it must be at most 1"):
        pymerge.plan(write_config(tmp_path, "ties", weight=1.0, boost=2), device="cpu")


def test_filters_choose_which_layers_have_a_pass(tmp_path: Path) -> None:
    base, _ = models(torch.float32)
    write_models(tmp_path, base)
    entries = [{"filter": "mlp", "value": {"lines": [2.0, 0.0]}}, {"value": "none"}]
    pymerge.merge(write_config(tmp_path, "task_arithmetic", weight=1.0), tmp_path / "plain", progress=False)
    config = write_config(tmp_path, "task_arithmetic", weight=1.0, layer_scale=entries)
    pymerge.merge(config, tmp_path / "scaled", progress=False)
    plain, scaled = (added(base, load_output(tmp_path / name)) for name in ("plain", "scaled"))
    for name, X in plain.items():
        torch.testing.assert_close(scaled[name], (2.0 if "mlp" in name else 1.0) * X, rtol=1e-3, atol=1e-7)
