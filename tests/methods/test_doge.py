"""DOGE against its steps in float64: the projected descent, and what is trimmed over all weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.adapters import factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import load_output, write_config, write_model, write_models
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import doge_delta, doge_thresholds
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (48, 32, 4), (20, 48, 3), (1, 16, 3), (16, 1, 2), (12, 10, 1)]
STEPS = {"iterations": 30}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_matches_the_released_steps(scope, shape, dtype):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype)
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    expected = doge_delta(taus, doge_thresholds([[tau] for tau in taus], 0.3), steps=30)
    found = merged_delta(base, experts, "doge", scope=scope, **STEPS)
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float64 else 1e-5)


def two_weights(dtype=torch.float32):
    """Two weights of other shapes, whose task vectors are of other sizes."""
    first, second = make_weights(24, 18, 3, dtype=dtype), make_weights(18, 30, 3, rms=2e-3, dtype=dtype)
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(2)]
    base = dict(zip(names, (first[0], second[0]), strict=True))
    experts = [dict(zip(names, pair, strict=True)) for pair in zip(first[1], second[1], strict=True)]
    return base, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_elements_of_all_weights_are_kept(tmp_path: Path, dtype):
    base, experts = two_weights(dtype)
    taus = [[as_float64(expert[name]) - as_float64(base[name]) for name in base] for expert in experts]
    thresholds = doge_thresholds(taus, 0.2)
    in_memory = pymerge.merge_state_dicts(base, experts, "doge", density=0.2, **STEPS)
    live = pymerge.Merger(base, experts, "doge", density=0.2, **STEPS).merge()
    for number, name in enumerate(base):
        expected = doge_delta([own[number] for own in taus], thresholds, steps=30)
        found = as_float64(in_memory[name]) - as_float64(base[name])
        assert relative_error(found, expected) < (1e-6 if dtype == torch.float64 else 1e-4)
        assert torch.equal(live[name], in_memory[name])
    alone = pymerge.merge_state_dicts(base, experts, "doge", density=0.2, scope="tensor", **STEPS)
    assert not any(torch.equal(alone[name], in_memory[name]) for name in base)


def test_files_are_read_twice_more_and_parts_agree(tmp_path: Path):
    base, _ = two_weights()
    write_models(tmp_path, base)
    plain = pymerge.plan(write_config(tmp_path, "doge", scope="tensor", **STEPS), device="cpu")
    plan = pymerge.plan(write_config(tmp_path, "doge", **STEPS), device="cpu", max_shard_size="1KB")
    assert plan.bytes_read == 3 * plain.bytes_read
    for part in ((1, 2), (2, 2)):
        pymerge.run(plan, tmp_path / "parts", progress=False, part=part)
    pymerge.finalize(plan, tmp_path / "parts", progress=False)
    pymerge.run(plan, tmp_path / "whole", progress=False)
    one, other = load_output(tmp_path / "parts"), load_output(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in base)


def test_the_ends():
    base, experts = make_weights(12, 10, 3, dtype=torch.float64)
    taus = [as_float64(expert - base) for expert in experts]
    plain = sum(0.07 * tau / np.linalg.norm(tau) for tau in taus)
    found = merged_delta(base, experts, "doge", iterations=0, density=1.0)
    assert relative_error(found, plain) < 1e-12
    half = merged_delta(base, experts, "doge", iterations=0, density=1.0, scale=0.5)
    assert relative_error(half, 0.5 * plain) < 1e-12
    assert merged_delta(base, experts, "doge", iterations=3, subspace=1).any()


def test_untouched_tasks_are_left_out_and_broken_ones_show():
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "doge"), base)
    experts[1][0, 0] = math.inf
    values = METHODS["doge"].defaults(2)
    action = METHODS["doge"].action("x", True, values, 2)
    with pytest.raises(ArgumentError, match="give scope: tensor"):
        action.run(Runner(), base, [base, base], "F32")
    assert action.knowing([0.0, 0.0]).run(Runner(), base, experts, "F32").isnan().all()
    narrower = "'calibrate' works on each tensor, and scope: model on all of them together; give scope: tensor, or"
    with pytest.raises(ArgumentError, match=narrower):
        pymerge.merge_tensors(base, [base], "doge", calibrate="svc")
    pymerge.merge_tensors(base, [base], "doge", calibrate="svc", scope="tensor")


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_task_that_did_not_touch_the_weight_changes_nothing(tasks):
    """Not the number of directions that the others are given, either."""
    base, experts = make_weights(24, 18, tasks, dtype=torch.float64)
    more = {"scope": "tensor", "subspace": 3, **STEPS}
    alone = merged_delta(base, experts, "doge", **more)
    assert relative_error(merged_delta(base, [*experts, base.clone()], "doge", **more), alone) < 1e-12


@pytest.mark.parametrize("more", [{}, {"scope": "tensor", "calibrate": "svc"}], ids=str)
def test_files_give_what_tensors_in_memory_give(tmp_path: Path, more):
    check_files_are_memory(tmp_path, "doge", **STEPS, **more)


def test_weights_that_no_adapter_changes_count_where_the_model_is_trimmed(tmp_path: Path):
    base, _ = two_weights()
    write_model(tmp_path / "base", base)
    first, second = base
    for seed in range(2):
        own = factors(base, [first.removesuffix(".weight")], seed=seed)
        write_adapter(tmp_path / f"e{seed}", own, base_model_name_or_path="base")
    config = write_config(tmp_path, "doge", density=0.2, **STEPS)
    pymerge.merge(config, tmp_path / "out", device="cpu", progress=False)
    merged = load_output(tmp_path / "out")
    experts = [read_all(opened(tmp_path / "base", tmp_path / f"e{seed}")) for seed in range(2)]
    expected = pymerge.merge_state_dicts(base, experts, "doge", density=0.2, **STEPS)
    assert torch.equal(merged[first], expected[first])
    assert torch.equal(merged[second], base[second])
