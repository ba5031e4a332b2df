"""linear and task_arithmetic against float64 sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pymerge
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64
from tests.helpers.solvers import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_exact_to_the_last_place(dtype):
    base, experts = make_weights(30, 20, 3, dtype=dtype)
    values = np.stack([as_float64(expert) for expert in experts])
    weights = np.array([0.5, -0.2, 0.9])
    linear = pymerge.merge_tensors(base, experts, "linear", weight=list(weights))
    arithmetic = pymerge.merge_tensors(base, experts, "task_arithmetic", weight=list(weights), lambda_=0.7)
    for merged, exact in [
        (linear, np.tensordot(weights / weights.sum(), values, 1)),
        (arithmetic, as_float64(base) + 0.7 * np.tensordot(weights, values - as_float64(base), 1)),
    ]:
        # One rounding to the storage dtype, and those of a float32 sum of terms that are larger than the result.
        rounding = torch.finfo(dtype).eps / 2 * np.abs(exact)
        summing = torch.finfo(torch.float32).eps * len(experts) * np.abs(values).max()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (np.abs(as_float64(merged) - exact) <= rounding + summing + smallest).all()
