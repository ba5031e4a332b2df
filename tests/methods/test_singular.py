"""TSV-M, Iso-C and Iso-CTS against float64 singular value decompositions, and where those are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import iso_delta, tsv_delta
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (96, 64, 8), (40, 96, 4), (1, 16, 3), (16, 1, 1), (12, 10, 1)]
PUBLISHED = {
    "tsv_m": ({}, tsv_delta),
    "iso_c": ({}, iso_delta),
    "iso_cts": ({"common_space_fraction": 0.5}, lambda base, experts: iso_delta(base, experts, 0.5)),
}
NAMES = list(PUBLISHED)
TOLERANCE = 1e-6  # of X, which is returned in float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", NAMES)
def test_matches_the_published_form(method, shape, dtype):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype)
    parameters, published = PUBLISHED[method]
    expected = published(as_float64(base), [as_float64(expert) for expert in experts])
    found = merged_delta(base, experts, method, **parameters)
    if np.any(expected):
        assert relative_error(found, expected) < (1e-9 if dtype == torch.float64 else TOLERANCE)
    else:  # fewer directions than tasks: none for each
        assert not found.any()


def test_one_task_and_equal_tasks_are_cut_at_their_share_of_the_directions():
    base, experts = make_weights(24, 16, 1, dtype=torch.float64)
    tau = as_float64(experts[0]) - as_float64(base)
    assert relative_error(merged_delta(base, experts, "tsv_m"), tau) < 1e-12
    P, s, Qh = np.linalg.svd(tau, full_matrices=False)
    s[8:] = 0
    assert relative_error(merged_delta(base, experts * 2, "tsv_m"), P * s @ Qh) < 1e-9


@pytest.mark.parametrize("method", NAMES)
def test_low_rank_task_vectors_have_a_result_that_rounding_does_not_decide(method):
    """Of adapters merged into the weights: rank 2 of 16 each."""
    base, experts = make_weights(20, 16, 3, rank=2, dtype=torch.float64)
    X = merged_delta(base, experts, method)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(20, 16, generator=generator, dtype=torch.float64) for _ in experts]
    moved = merged_delta(base, [e + 1e-13 * n for e, n in zip(experts, noise, strict=True)], method)
    assert relative_error(moved, X) < 1e-6
    assert np.linalg.matrix_rank(X, tol=1e-6 * np.linalg.norm(X)) <= 6


def test_iso_c_gives_every_direction_the_same_weight():
    base, experts = make_weights(12, 20, 3, dtype=torch.float64)
    total = sum(as_float64(expert) for expert in experts) - 3 * as_float64(base)
    s = np.linalg.svd(merged_delta(base, experts, "iso_c"), compute_uv=False)
    np.testing.assert_allclose(s, np.linalg.svd(total, compute_uv=False).mean(), rtol=1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_does_not_depend_on_the_scale_of_the_deltas(method):
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    small_X, large_X = (merged_delta(base, each, method) for each in (experts, large))
    assert relative_error(large_X, 64 * small_X) < 1e-9


@pytest.mark.parametrize("method", NAMES)
def test_untouched_and_broken_tensors(method):
    base, experts = make_weights(6, 8, 2)
    same = pymerge.merge_tensors(base, [base, base.clone()], method)
    assert torch.equal(same, base)
    experts[1][0, 0] = math.inf
    action = METHODS[method].action("x", True, METHODS[method].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


@pytest.mark.parametrize(("method", "directions"), [("iso_c", 6), ("iso_cts", 6)])
def test_the_mean_may_be_over_the_directions_that_are_there(method, directions):
    base, experts = make_weights(20, 16, 3, rank=2, dtype=torch.float64)
    over_all, over_rank = (merged_delta(base, experts, method, mean_over=over) for over in ("all", "rank"))
    assert relative_error(over_rank, over_all * 16 / directions) < 1e-9
    base, experts = make_weights(12, 10, 3, dtype=torch.float64)  # of full rank there is no difference
    over_all, over_rank = (merged_delta(base, experts, "iso_c", mean_over=over) for over in ("all", "rank"))
    assert np.array_equal(over_all, over_rank)


def test_common_space_fraction_is_a_share():
    base, experts = make_weights(6, 8, 2)
    with pytest.raises(ArgumentError, match=r"common_space_fraction.*at most 1"):
        pymerge.merge_tensors(base, experts, "iso_cts", common_space_fraction=1.5)
    full = pymerge.merge_tensors(base, experts, "iso_cts", common_space_fraction=1.0)
    assert torch.equal(full, pymerge.merge_tensors(base, experts, "iso_c"))
