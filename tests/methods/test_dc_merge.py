"""DC-Merge against its formula in float64, its two variants, and what they cannot do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError, PlanError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.checkpoints import write_config, write_models
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import dc_delta
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one column, one task.
SHAPES = [(7, 9, 3), (96, 64, 8), (40, 96, 4), (16, 1, 1), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_matches_the_published_form(shape, dtype):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype)
    expected = dc_delta(as_float64(base), [as_float64(expert) for expert in experts])
    found = merged_delta(base, experts, "dc_merge")
    assert relative_error(found, expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("smoothing", ["avg", "linear"])
def test_the_variant_for_adapters(smoothing):
    base, experts = make_weights(40, 36, 2, rank=16, dtype=torch.float64)
    expected = dc_delta(as_float64(base), [as_float64(expert) for expert in experts], 1e-2, 16, smoothing)
    found = merged_delta(base, experts, "dc_merge", variant="lora", smoothing=smoothing, core_share=1e-2)
    assert relative_error(found, expected) < 1e-9
    low, found = make_weights(40, 36, 2, rank=3, dtype=torch.float64), None
    moved = [expert + 1e-13 * torch.randn(40, 36, dtype=torch.float64) for expert in low[1]]
    one, two = (merged_delta(low[0], each, "dc_merge", variant="lora", core_share=1.0) for each in (low[1], moved))
    assert relative_error(one, two) < 1e-6  # rounding decides no direction


def test_one_task_is_cut_to_its_largest_entries():
    base, experts = make_weights(24, 16, 1, dtype=torch.float64)
    tau = as_float64(experts[0]) - as_float64(base)
    assert relative_error(merged_delta(base, experts, "dc_merge", core_share=1.0), tau) < 1e-12
    P, s, Qh = np.linalg.svd(tau, full_matrices=False)
    s[5:] = 0
    assert relative_error(merged_delta(base, experts, "dc_merge", core_share=5 / 256), P * s @ Qh) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_choose_among_equal_entries(seed):
    """Equal models, opposite ones, and values smoothed to their mean: entries are equal in exact arithmetic."""
    base, (expert,) = make_weights(24, 32, 1, dtype=torch.float64, seed=seed)
    tau = as_float64(expert) - as_float64(base)
    P, s, Qh = np.linalg.svd(tau, full_matrices=False)
    # The core of each has the first value's half at two entries of the diagonal and at two beside it.
    first = 0.5 * s[0] * np.outer(P[:, 0], Qh[0])
    assert relative_error(merged_delta(base, [expert, expert.clone()], "dc_merge"), first) < 1e-9
    against = merged_delta(base, [expert, 2 * base - expert], "dc_merge", core_share=0.1)
    assert np.linalg.norm(against) < 1e-9 * np.linalg.norm(tau)
    smoothed = s[:4].mean() * P[:, :4] @ Qh[:4]
    assert relative_error(merged_delta(base, [expert], "dc_merge", variant="lora", rank=4), smoothed) < 1e-9


def test_does_not_depend_on_the_scale_of_the_deltas():
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    X = merged_delta(base, experts, "dc_merge")
    assert relative_error(merged_delta(base, large, "dc_merge"), 64 * X) < 1e-9
    assert relative_error(merged_delta(base, experts, "dc_merge", scale=0.5), 0.5 * X) < 1e-9


def test_untouched_and_broken_tensors():
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "dc_merge"), base)
    experts[1][0, 0] = math.inf
    action = METHODS["dc_merge"].action("x", True, METHODS["dc_merge"].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


def test_more_directions_than_a_weight_has_are_refused_by_the_plan(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.0.mlp.up_proj.weight"
    write_models(tmp_path, {name: torch.randn(40, 30, generator=generator)})
    config = write_config(tmp_path, "dc_merge", variant="lora")
    with pytest.raises(PlanError, match=rf"{name}: 16 directions of each of 2 tasks .*give rank 15 or lower"):
        pymerge.plan(config, device="cpu")
    assert pymerge.plan(write_config(tmp_path, "dc_merge", variant="lora", rank=15), device="cpu")
    with pytest.raises(ArgumentError, match="'rank' is that of 'variant: lora'"):
        pymerge.merge_tensors(*make_weights(6, 8, 2), "dc_merge", rank=2)


def test_files_give_what_tensors_in_memory_give(tmp_path: Path):
    check_files_are_memory(tmp_path, "dc_merge", core_share=0.1)
