"""wudi against the published loop in float64 (helpers/oracles.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pymerge
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import wudi_delta
from tests.helpers.solvers import DTYPES, SHAPES, merged_delta

WUDI_TOLERANCE = 2e-5  # of the displacement from the start, float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wudi_matches_the_published_loop(shape, dtype):
    d_out, d_in, tasks, rank = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=rank, dtype=dtype)
    expected, start = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts])
    found = merged_delta(base, experts, "wudi")
    displacement = expected - start
    if tasks == 1:  # stationary from the start: nothing moves
        assert relative_error(found, expected) < 1e-6
    else:
        assert relative_error(found, expected, displacement) < WUDI_TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wudi_float64_inputs_are_merged_in_float64(backend):
    base, experts = make_weights(20, 30, 3, dtype=torch.float64)
    expected, start = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts])
    merged = pymerge.merge_tensors(base, experts, "wudi", backend=backend)
    assert merged.dtype == torch.float64
    assert relative_error(as_float64(merged) - as_float64(base), expected, expected - start) < 1e-10


@pytest.mark.parametrize(("iterations", "lr", "scale"), [(0, 1e-5, 1.0), (1, 1e-4, 1.0), (40, 1e-4, 0.5)])
def test_wudi_parameters(iterations, lr, scale):
    base, experts = make_weights(18, 22, 3)
    expected, _ = wudi_delta(as_float64(base), [as_float64(expert) for expert in experts], iterations, lr)
    found = merged_delta(base, experts, "wudi", iterations=iterations, lr=lr, scale=scale)
    assert relative_error(found, scale * expected) < 1e-6


def test_wudi_lr_auto_scales_with_the_deltas():
    """Deltas s times as large get s times the step, and so s times the solution."""
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 10 * (expert - base) for expert in experts]
    small_X = merged_delta(base, experts, "wudi", lr="auto")
    large_X = merged_delta(base, large, "wudi", lr="auto")
    assert relative_error(large_X, 10 * small_X) < 1e-3  # Adam's eps is the one thing that does not scale
    rms = float(torch.stack([expert - base for expert in experts]).square().mean().sqrt())
    fixed = merged_delta(base, experts, "wudi", lr=1e-5 * rms / 5e-4)
    np.testing.assert_allclose(small_X, fixed, rtol=1e-12, atol=0)
