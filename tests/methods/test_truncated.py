"""STAR and CART against their formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import leading
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (96, 64, 8), (40, 96, 4), (1, 16, 3), (16, 1, 2), (12, 10, 1)]
NAMES = ["star", "cart"]


def star(taus, eta=40.0):
    parts = []
    for tau in taus:
        s = np.linalg.svd(tau, compute_uv=False)
        count = int(np.argmax(np.cumsum(s) >= eta / 100 * s.sum() * (1 - 1e-12))) + 1
        parts.append(leading(tau, count) * s.sum() / s[:count].sum())
    return sum(parts) / len(taus)


def cart(taus, share=0.04, factor=0.1):
    mean = sum(taus) / len(taus)
    rank = math.ceil(share * min(mean.shape))
    return mean + factor * sum(leading(tau - mean, rank) for tau in taus)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("published", "parameters"),
    [(star, {}), (star, {"eta": 90.0}), (cart, {}), (cart, {"share": 0.3, "lambda": 0.7})],
)
def test_matches_the_published_form(published, parameters, shape, dtype):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype)
    given = {"factor" if name == "lambda" else name: value for name, value in parameters.items()}
    expected = published([as_float64(expert) - as_float64(base) for expert in experts], **given)
    found = merged_delta(base, experts, published.__name__, **parameters)
    assert relative_error(found, expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("method", NAMES)
def test_one_task_equal_tasks_and_the_ends(method):
    base, experts = make_weights(12, 10, 3, dtype=torch.float64)
    tau = as_float64(experts[0] - base)
    one = merged_delta(base, experts[:1], method)
    assert relative_error(merged_delta(base, experts[:1] * 3, method), one) < 1e-9
    mean = as_float64(sum(experts) / 3 - base)
    if method == "cart":
        assert relative_error(one, tau) < 1e-12
        assert relative_error(merged_delta(base, experts, method, share=0.0), mean) < 1e-12
        assert relative_error(merged_delta(base, experts, method, share=1.0, lambda_=1 / 3), mean) < 1e-9
    else:
        assert relative_error(merged_delta(base, experts, method, eta=100.0), mean) < 1e-9


@pytest.mark.parametrize("method", NAMES)
def test_scales_with_the_deltas_and_by_scale(method):
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    X = merged_delta(base, experts, method)
    assert relative_error(merged_delta(base, large, method), 64 * X) < 1e-9
    assert relative_error(merged_delta(base, experts, method, scale=0.5), 0.5 * X) < 1e-9


@pytest.mark.parametrize("method", NAMES)
def test_untouched_and_broken_tensors(method):
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], method), base)
    experts[1][0, 0] = math.inf
    action = METHODS[method].action("x", True, METHODS[method].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


@pytest.mark.parametrize("method", NAMES)
def test_files_give_what_tensors_in_memory_give(tmp_path: Path, method):
    check_files_are_memory(tmp_path, method)
