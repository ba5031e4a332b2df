"""linear, task_arithmetic and passthrough against float64 sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pymerge
from pymerge.errors import ArgumentError
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers import methods
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


@pytest.mark.parametrize("backend", methods.BACKENDS)
@pytest.mark.parametrize("shape", methods.SHAPES, ids=str)
def test_passthrough_scales_one_model(shape: tuple[int, ...], backend: str) -> None:
    for dtype, eps in methods.ROUNDINGS:
        base, models = methods.half_moved(shape, 1, dtype)
        found = pymerge.merge_tensors(base, models, "passthrough", backend=backend, scale=0.3)
        assert found.dtype == dtype
        methods.check(found, 0.3 * as_float64(models[0]), eps)


@pytest.mark.parametrize("dtype", methods.DTYPES, ids=str)
def test_passthrough_by_1_is_a_copy(dtype: torch.dtype) -> None:
    merged = methods.check_untouched("passthrough", dtype)
    base, _ = methods.half_moved((5, 6), 1, dtype)
    base[0, 0] = -0.0
    assert_same("the sign of zero too", merged, base)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_base", [True, False])
def test_not_a_number_is_in_the_result(value: float, in_base: bool) -> None:
    """Of passthrough, which does not read the base."""
    methods.check_shows_nonfinite("passthrough", value, in_base, reads_base=False)


def test_passthrough_takes_one_model() -> None:
    base, models = methods.half_moved((4, 5), 2)
    with pytest.raises(
        ArgumentError,
        match=r"'passthrough' merges exactly 1 model, and 2 are listed \(expert 0, expert 1\); delete",
    ):
        pymerge.merge_tensors(base, models, "passthrough")
