"""LoRE-Merging against its coordinate descent in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods import METHODS
from pymerge.ops.shrink import RULES
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import shrunk
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (48, 32, 4), (20, 48, 3), (1, 16, 3), (16, 1, 2), (12, 10, 1)]


def lore(models, mu=0.01, update="svt", iterations=20, factor=1.0):
    """On whole weights, without a base."""
    deltas = [np.zeros_like(models[0]) for _ in models]
    common = sum(models) / len(models)
    for _ in range(iterations):
        common = sum(model - delta for model, delta in zip(models, deltas, strict=True)) / len(models)
        deltas = [shrunk(model - common, mu, update) for model in models]
    return common + factor * sum(deltas) / len(models)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("update", RULES)
def test_matches_the_published_steps(update, shape, dtype):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype, rms=5e-3)
    mu = 0.3 if update == "exact_sq" else 0.01
    expected = lore([as_float64(expert) for expert in experts], mu, update, 6, 0.5) - as_float64(base)
    found = merged_delta(base, experts, "lore", update=update, mu=mu, iterations=6, lambda_=0.5)
    assert relative_error(found, expected) < (1e-8 if dtype == torch.float64 else 1e-6)


def test_the_ends():
    base, experts = make_weights(12, 10, 3, dtype=torch.float64, rms=5e-3)
    mean = as_float64(sum(experts) / 3 - base)
    assert relative_error(merged_delta(base, experts, "lore", mu=1e3, lambda_=0.3), mean) < 1e-12
    assert relative_error(merged_delta(base, experts, "lore", mu=0.0), mean) < 1e-9
    assert relative_error(merged_delta(base, experts, "lore", iterations=0), mean) < 1e-12
    for alike in (experts[:1], experts[:1] * 3):
        assert relative_error(merged_delta(base, alike, "lore", lambda_=0.3), as_float64(experts[0] - base)) < 1e-12
    assert (
        relative_error(merged_delta(base, experts, "lore", scale=0.5), 0.5 * merged_delta(base, experts, "lore")) < 1e-9
    )


def test_untouched_and_broken_tensors():
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "lore"), base)
    experts[1][0, 0] = math.inf
    action = METHODS["lore"].action("x", True, METHODS["lore"].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


def test_files_give_what_tensors_in_memory_give(tmp_path: Path):
    check_files_are_memory(tmp_path, "lore", iterations=3)
