"""wudi_flow, swudi and swudi_a against eigenvectors in float64 (helpers/oracles.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import filter_delta
from tests.helpers.solvers import DTYPES, SHAPES, merged_delta

FILTER_TOLERANCE = 2e-5  # of X, float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "time", "rank", "parameters"),
    [
        ("wudi_flow", 300.0, 1.0, {}),
        ("wudi_flow", 1300.0, 1.0, {"time": 1300}),
        ("swudi", 300.0, 1.0, {}),
        ("swudi", 1300.0, 0.65, {"time": 1300, "rank_ratio": 0.65}),
        ("swudi_a", float("inf"), "participation_sqrt", {}),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, float)) else "",
)
def test_closed_forms_match_eigenvectors_in_float64(shape, dtype, method, time, rank, parameters):
    d_out, d_in, tasks, low = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=low, dtype=dtype)
    expected, _ = filter_delta(as_float64(base), [as_float64(expert) for expert in experts], time, rank)
    assert relative_error(merged_delta(base, experts, method, **parameters), expected) < FILTER_TOLERANCE


def test_flow_limits():
    """Time 0 is the sum of task vectors; a long time the least-squares solution; one task is its own merge."""
    base, experts = make_weights(40, 24, 3)
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    np.testing.assert_allclose(merged_delta(base, experts, "wudi_flow", time=0), sum(taus), atol=1e-9)
    A = sum(tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    B = sum(tau @ tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    exact = B @ np.linalg.inv(A)
    long = merged_delta(base, experts, "wudi_flow", time=1e9, precision="float64")
    assert relative_error(long, exact) < 1e-7
    for method in ("wudi_flow", "swudi", "swudi_a"):
        assert relative_error(merged_delta(base, experts[:1], method), taus[0]) < 1e-6


def test_flow_does_not_depend_on_the_scale_of_the_deltas():
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    small_X, large_X = (merged_delta(base, each, "wudi_flow") for each in (experts, large))
    assert relative_error(large_X, 64 * small_X) < 1e-9
