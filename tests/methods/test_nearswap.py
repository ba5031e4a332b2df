"""nearswap against its float64 form, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

import pymerge
from pymerge.errors import ArgumentError
from pymerge.testing.compare import as_float64, assert_same
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], backend: str) -> None:
    for dtype, eps in ROUNDINGS:
        base, models = half_moved(shape, 1, dtype)
        for t in (0.0, 1e-4, 2e-3):
            found = pymerge.merge_tensors(base, models, "nearswap", backend=backend, t=t)
            assert found.dtype == dtype
            check(found, oracles.nearswap(as_float64(base), as_float64(models[0]), t), eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_and_empty_tensors(backend: str) -> None:
    check_float64("nearswap", backend, lambda W0, Ws: oracles.nearswap(W0, Ws[0], 1e-4))
    check_empty("nearswap", backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_tensors_come_back(dtype: torch.dtype) -> None:
    check_untouched("nearswap", dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_base", [True, False])
def test_not_a_number_is_in_the_result(value: float, in_base: bool) -> None:
    check_shows_nonfinite("nearswap", value, in_base)


def test_limits() -> None:
    base, (model,) = half_moved((40, 30), 1)
    assert_same("t = 0", pymerge.merge_tensors(base, [model], "nearswap", t=0), base)
    assert_same("t beyond all", pymerge.merge_tensors(base, [model], "nearswap", t=1.0), model)
    moved = pymerge.merge_tensors(base, [model], "nearswap", t=1e-4) - base
    assert 0.9e-4 < float(moved.abs().max()) <= 1e-4 + 3e-7
    near = (model - base).abs() <= 1e-4
    assert_same("the rest arrives", (base + moved)[near], model[near])


def test_errors() -> None:
    base, models = half_moved((4, 5), 2)
    with pytest.raises(ArgumentError, match="'nearswap' merges exactly 1 model beside the base, and 2 are listed"):
        pymerge.merge_tensors(base, models, "nearswap")
    with pytest.raises(ArgumentError, match="parameter 't' is -1; it must be at least 0"):
        pymerge.merge_tensors(base, models[:1], "nearswap", t=-1)
