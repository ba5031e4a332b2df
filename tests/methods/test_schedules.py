"""Schedules of `linear`: averages of a training's checkpoints against the decays that they stand for, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.cli.tensor_table import plan_json
from pymerge.config.merge_config import load_config, resolve
from pymerge.errors import ArgumentError, ConfigError
from pymerge.methods import get_method
from pymerge.methods.base import PASSES
from pymerge.methods.schedules import SCHEDULE, weights_of
from pymerge.testing.compare import as_float64
from tests.helpers.checkpoints import llama, llama_config, write_models
from tests.helpers.configs import problems

SCHEDULES = SCHEDULE.choices[1:]
# The learning rate over its decay, from 1 to 0.
LEARNING_RATES: dict[str, Callable[[float], float]] = {
    "uniform": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def trajectory(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Checkpoints of a training, the oldest first."""
    generator = torch.Generator().manual_seed(count)
    steps = torch.randn(count, 6, 5, generator=generator, dtype=torch.float64)
    return [step.to(dtype) for step in steps.cumsum(0)]


def annealed(checkpoints: list[np.ndarray], schedule: str, decay: float = 0.8) -> np.ndarray:
    """The oldest checkpoint, and each update after it times the learning rate that it would have had; or the EMA."""
    if schedule == "ema":
        average = checkpoints[0]
        for each in checkpoints[1:]:
            average = decay * average + (1 - decay) * each
        return average
    rate, found = LEARNING_RATES[schedule], checkpoints[0]
    for number, (before, after) in enumerate(pairwise(checkpoints), start=1):
        found = found + rate(number / len(checkpoints)) * (after - before)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_average_is_the_training_with_a_decayed_learning_rate(schedule: str, count: int, dtype: torch.dtype) -> None:
    checkpoints = trajectory(count, dtype)
    found = pymerge.merge_tensors(None, checkpoints, "linear", schedule=schedule)
    exact = annealed([as_float64(each) for each in checkpoints], schedule)
    inside = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = torch.finfo(dtype).eps / 2 * np.abs(exact) + 2 * count * inside * max(
        np.abs(as_float64(each)).max() for each in checkpoints
    )
    assert (np.abs(as_float64(found) - exact) <= bound).all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97, 1.0])
def test_ema_goes_by_its_decay(decay: float) -> None:
    checkpoints = trajectory(5, torch.float64)
    found = pymerge.merge_tensors(None, checkpoints, "linear", schedule="ema", decay=decay)
    exact = annealed([as_float64(each) for each in checkpoints], "ema", decay)
    np.testing.assert_allclose(as_float64(found), exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_shares(schedule: str, count: int) -> None:
    weights = weights_of(schedule, count, 0.8)
    assert len(weights) == count
    assert min(weights) > 0
    assert math.fsum(weights) / (count if schedule == "uniform" else 1) == pytest.approx(1, abs=1e-15)


def test_1_sqrt_falls_and_ema_rises_behind_its_start() -> None:
    falling = weights_of("1-sqrt", 6, 0.8)
    assert list(falling) == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(1 / math.sqrt(6))
    assert list(weights_of("ema", 6, 0.8)[1:]) == sorted(weights_of("ema", 6, 0.8)[1:])


def test_uniform_is_weight_1_bit_for_bit() -> None:
    checkpoints = trajectory(7)
    uniform = pymerge.merge_tensors(None, checkpoints, "linear", schedule="uniform")
    assert torch.equal(uniform, pymerge.merge_tensors(None, checkpoints, "linear", weight=1.0))


def test_weights_stand_in_the_plan_and_in_order_of_models(tmp_path: Path) -> None:
    tensors = llama()
    write_models(tmp_path, tensors, experts=3, config=llama_config(tensors))
    models = ["e2", "e0", "base"]
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / model)} for model in models],
        "parameters": {"schedule": "cosine"},
    }
    shown = json.loads(plan_json(pymerge.plan(config)))["tensors"]
    weights = [0.25, 0.5, 0.25]  # of three, by half angles
    for row in shown:
        assert row["parameters"] == {"schedule": "cosine", "weight": pytest.approx(weights)}
        assert [Path(each["model"]).name for each in row["inputs"]] == models
    pymerge.merge(config, tmp_path / "out", progress=False)
    merged = load_file(tmp_path / "out/model.safetensors")
    states = [load_file(tmp_path / model / "model.safetensors") for model in models]
    for name, tensor in merged.items():
        exact = sum(weight * as_float64(state[name]) for weight, state in zip(weights, states, strict=True))
        np.testing.assert_allclose(as_float64(tensor), exact, rtol=0, atol=2e-7)


def test_plan_shows_decay_with_ema_alone() -> None:
    method = get_method("linear")
    values = resolve(linear({"schedule": "ema", "decay": 0.5}), method, "w", 0.0, [0, 1])
    shown = method.shown(values)
    assert (shown.merge, shown.model) == ({"schedule": "ema", "decay": 0.5}, {"weight": (0.5, 0.5)})
    shown = method.shown(resolve(linear({"weight": 3}), method, "w", 0.0, [0, 1]))
    passes = {parameter.name: parameter.default for parameter in PASSES}  # left out where the plan is printed
    assert (shown.merge, shown.model) == ({"normalize": True, **passes}, {"weight": (3.0, 3.0)})


def linear(parameters: dict[str, Any], own: dict[str, Any] | None = None) -> Any:
    entries: list[dict[str, Any]] = [{"model": "a"}, {"model": "b"}]
    if own:
        entries[1]["parameters"] = own
    return load_config({"merge_method": "linear", "models": entries, "parameters": parameters})


INSTEAD = "'schedule' stands in place of 'weight', and both are given; delete one of the two"
OF_EMA = "'decay' is that of 'schedule: ema'; set that, or delete 'decay'"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("{weight: 1, schedule: ema}", INSTEAD),
        ("{schedule: cosine, decay: 0.5}", OF_EMA),
        ("{weight: 1, decay: 0.5}", OF_EMA),
        ("{schedule: sqrt}", "it must be one of none, uniform, ema, cosine, 1-sqrt"),
        ("{schedule: ema, decay: 1.5}", "parameter 'decay' is 1.5; it must be at most 1"),
        ("{schedule: [ema, cosine]}", "'schedule' cannot change over layers: give one value"),
        ("{schedule: none}", "model 'a' has no 'weight', which 'linear' requires"),
    ],
)
def test_what_does_not_go_together_is_refused(parameters: str, expected: str) -> None:
    found = problems(f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {parameters}\n")
    assert expected in found[0]
    assert found[0].startswith("config:")


def test_weight_of_one_model_beside_a_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=INSTEAD):
        linear({"schedule": "ema"}, {"weight": 2})


def test_schedule_may_go_by_filters() -> None:
    """Where none fits there are no weights, and the remedy is one that would be taken."""
    filtered = [{"filter": "mlp", "value": "uniform"}]
    method = get_method("linear")
    assert resolve(linear({"schedule": filtered}), method, "mlp.up", 0.0, [0, 1]).merge["schedule"] == "uniform"
    with pytest.raises(ConfigError, match="no entry of 'weight' or 'schedule' of model 'a' fits"):
        resolve(linear({"schedule": filtered}), method, "attn.q", 0.0, [0, 1])
    whole = linear({"schedule": [*filtered, {"value": "ema"}]})
    assert resolve(whole, method, "attn.q", 0.0, [0, 1]).merge["schedule"] == "ema"


def test_slices_have_a_schedule_each() -> None:
    sources = [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 1]}]
    config = {"merge_method": "linear", "slices": [{"sources": sources, "parameters": {"schedule": "ema"}}]}
    assert load_config(config).slices[0].parameters["schedule"].values == ("ema",)


def test_python_refuses_them_together() -> None:
    checkpoints = trajectory(3)
    with pytest.raises(ArgumentError, match=INSTEAD):
        pymerge.merge_tensors(None, checkpoints, "linear", weight=[1, 2, 3], schedule="ema")
    with pytest.raises(ArgumentError, match=OF_EMA):
        pymerge.merge_tensors(None, checkpoints, "linear", decay=0.5)


def test_merger_changes_its_schedule() -> None:
    first, *rest = ({"w": tensor} for tensor in trajectory(3))
    merger = pymerge.Merger(None, [first, *rest], "linear", schedule="ema")
    found = merger.merge(schedule="1-sqrt")["w"]
    exact = annealed([as_float64(each["w"]) for each in (first, *rest)], "1-sqrt")
    np.testing.assert_allclose(as_float64(found), exact, atol=2e-6)
    with pytest.raises(ArgumentError, match=INSTEAD):
        merger.merge(weight=2.0)
