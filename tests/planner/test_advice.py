"""The plan's warning about deltas that a fixed step size does not suit, from a few rows of each tensor."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.checkpoint.reader import Reader
from pymerge.planner.advice import delta_squares
from tests.helpers.checkpoints import fine_tuned, llama, load_output, write_config, write_model, write_models

SOLVED = 2 * 7  # q, k, v, o, gate, up, down of two blocks


def models(folder: Path, scale: float) -> Path:
    base = llama()
    write_model(folder / "base", base)
    for index in range(2):
        write_model(folder / f"e{index}", fine_tuned(base, index, scale))
    return folder


@pytest.mark.parametrize(
    ("scale", "parameters", "direction"),
    [
        (5e-4, {}, None),
        (1.5e-3, {}, None),
        (2e-2, {}, "little"),
        (2e-5, {}, "far"),
        (2e-2, {"lr": "auto"}, None),
        (2e-2, {"lr": 4e-4}, None),
    ],
)
def test_wudi_with_a_fixed_lr(
    tmp_path: Path, scale: float, parameters: dict[str, object], direction: str | None
) -> None:
    config = write_config(models(tmp_path, scale), "wudi", **parameters)
    warnings = pymerge.plan(config).warnings
    if direction is None:
        assert warnings == ()
        return
    (warning,) = warnings
    assert warning.startswith(f"{SOLVED} of {SOLVED} tensors that are solved ('model.layers.0.mlp.")
    assert f"X moves too {direction}; set lr: auto" in warning


@pytest.mark.parametrize(
    ("size", "parameters", "warned"),
    [
        (1 / 18, {}, True),  # squared norms of about 1
        (1 / 18, {"variant": "paper"}, True),
        (1 / 18, {"gamma": "scale_free"}, False),
        (1 / 18, {"gamma_threshold": -1}, False),
        (1e-3, {}, False),
    ],
)
def test_ace_where_its_measure_has_a_pole(
    tmp_path: Path, size: float, parameters: dict[str, object], warned: bool
) -> None:
    base = llama()
    write_model(tmp_path / "base", base)
    for index, factor in enumerate((0.5, 2.0)):
        write_model(tmp_path / f"e{index}", fine_tuned(base, index, factor * size))
    warnings = pymerge.plan(write_config(tmp_path, "ace", **parameters)).warnings
    assert len(warnings) == warned
    if warned:
        assert warnings[0].startswith(f"{SOLVED} of {SOLVED} tensors that are solved ('model.layers.0.mlp.")
        assert "gamma has a pole" in warnings[0]
        assert "set gamma: scale_free" in warnings[0]


@pytest.mark.parametrize(("method", "more"), [("wudi_flow", {}), ("ace", {"gamma": "scale_free"}), ("linear", {})])
def test_other_methods_read_nothing(tmp_path: Path, method: str, more: dict[str, str]) -> None:
    config = write_config(models(tmp_path, 2e-2), method, **more)
    plan = pymerge.plan(config)
    assert plan.warnings == ()
    assert not any(step.action.minds_delta_size for step in plan.steps)


def test_the_root_mean_square_is_that_of_the_deltas(tmp_path: Path) -> None:
    plan = pymerge.plan(write_config(models(tmp_path, 3e-3), "wudi"))
    with Reader(plan.inputs.stamps) as reader:
        for step in plan.steps:
            if step.action.minds_delta_size:
                assert delta_squares(step, reader) == pytest.approx([9e-6] * 2, rel=0.8)


def test_experts_that_did_not_touch_a_tensor_do_not_count(tmp_path: Path) -> None:
    base = llama()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "e0", base)
    write_model(tmp_path / "e1", fine_tuned(base, 1, 3e-3))
    plan = pymerge.plan(write_config(tmp_path, "wudi"))
    with Reader(plan.inputs.stamps) as reader:
        step = next(step for step in plan.steps if step.action.minds_delta_size)
        (square,) = delta_squares(step, reader)
        assert square == pytest.approx(9e-6, rel=0.8)


def test_matrices_of_a_stack_are_compared_in_blocks(tmp_path: Path) -> None:
    """Each is one row of it: in float64 those of all models would be many times what the merge itself may hold."""
    stack = {"model.layers.0.mlp.experts.down_proj": torch.randn(5, 600, 500).bfloat16()}
    write_models(tmp_path, stack)
    plan = pymerge.plan(write_config(tmp_path, "wudi"))
    (step,) = plan.steps
    with Reader(plan.inputs.stamps) as reader:
        tracemalloc.start()
        found = delta_squares(step, reader)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    deltas = [load_output(tmp_path / f"e{number}")[step.name][:4].double() for number in range(2)]
    base = load_output(tmp_path / "base")[step.name][:4].double()
    assert found == pytest.approx([float((each - base).square().mean()) for each in deltas])
    matrix = 2 * 600 * 500
    assert peak < 2 * matrix + 5 * 8 * 2**18
