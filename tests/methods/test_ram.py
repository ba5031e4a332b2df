"""ram and ramplus_tl against their float64 forms, and their exact values."""

from __future__ import annotations

import math

import pytest
import torch

import pymerge
from pymerge.errors import ArgumentError
from pymerge.testing.compare import as_float64
from tests.helpers import oracles_mergekit as oracles
from tests.helpers.methods import (
    BACKENDS,
    DTYPES,
    ROUNDINGS,
    SHAPES,
    check,
    check_empty,
    check_float64,
    check_shows_nonfinite,
    check_untouched,
    half_moved,
)

BOTH = pytest.mark.parametrize("method", ["ram", "ramplus_tl"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], backend: str) -> None:
    for dtype, eps in ROUNDINGS:
        base, models = half_moved(shape, 3, dtype)
        W0, Ws = as_float64(base), [as_float64(model) for model in models]
        for epsilon in (0.0, 1e-4, 1e-2):
            found = pymerge.merge_tensors(base, models, "ram", backend=backend, epsilon=epsilon)
            assert found.dtype == dtype
            check(found, oracles.ram(W0, Ws, epsilon), eps)
            plus = {"epsilon": epsilon, "r": 0.5, "alpha": 0.7}
            found = pymerge.merge_tensors(base, models, "ramplus_tl", backend=backend, **plus)
            assert found.dtype == dtype
            check(found, oracles.ram(W0, Ws, epsilon, 0.5, 0.7), eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_and_empty_tensors(backend: str) -> None:
    check_float64("ram", backend, lambda W0, Ws: oracles.ram(W0, Ws, 1e-5))
    check_float64("ramplus_tl", backend, lambda W0, Ws: oracles.ram(W0, Ws, 1e-5, 0.1, 0.2))
    check_empty("ram", backend)
    check_empty("ramplus_tl", backend)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_tensors_come_back(method: str, dtype: torch.dtype) -> None:
    check_untouched(method, dtype)


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_base", [True, False])
def test_not_a_number_is_in_the_result(method: str, value: float, in_base: bool) -> None:
    check_shows_nonfinite(method, value, in_base)


def test_lone_and_shared_elements_are_counted() -> None:
    """Model 0: 2 lone, 1 shared, so 1 + 0.5 * min(1/2, alpha); model 1: 1 lone, 1 shared."""
    base = torch.zeros(5)
    models = [torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 8.0, 16.0, 1e-6])]
    assert pymerge.merge_tensors(base, models, "ram").tolist() == [1.0, 2.0, 6.0, 16.0, 0.0]
    plus = pymerge.merge_tensors(base, models, "ramplus_tl", r=0.5, alpha=2.0)
    assert plus.tolist() == [1.25, 2.5, 6.0, 24.0, 0.0]
    limited = pymerge.merge_tensors(base, models, "ramplus_tl", r=0.5, alpha=0.25)
    assert limited.tolist() == [1.125, 2.25, 6.0, 18.0, 0.0]


def test_an_epsilon_below_0_is_an_error() -> None:
    base, models = half_moved((4, 5), 2)
    with pytest.raises(ArgumentError, match="parameter 'epsilon' is -1; it must be at least 0"):
        pymerge.merge_tensors(base, models, "ram", epsilon=-1)
