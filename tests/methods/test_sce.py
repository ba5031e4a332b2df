"""sce against its float64 form, and its exact values."""

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], backend: str) -> None:
    for dtype, eps in ROUNDINGS:
        base, models = half_moved(shape, 3, dtype)
        W0, Ws = as_float64(base), [as_float64(model) for model in models]
        for share in (0.0, 0.3, 1.0, 2.0):
            for compat in ("none", "mergekit"):
                found = pymerge.merge_tensors(base, models, "sce", backend=backend, select_topk=share, compat=compat)
                assert found.dtype == dtype
                check(found, oracles.sce(W0, Ws, share, compat == "mergekit"), eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_and_empty_tensors(backend: str) -> None:
    check_float64("sce", backend, lambda W0, Ws: oracles.sce(W0, Ws, 1.0))
    check_empty("sce", backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_tensors_come_back(dtype: torch.dtype) -> None:
    check_untouched("sce", dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_base", [True, False])
def test_not_a_number_is_in_the_result(value: float, in_base: bool) -> None:
    check_shows_nonfinite("sce", value, in_base)


def test_energy_decides_the_weight_where_mergekit_gives_equal_ones() -> None:
    """Mean squares 1e-8 and 4e-8: below mergekit's limit of 1e-6, above which its weights are 1/5 and 4/5."""
    base, models = torch.zeros(3), [torch.full((3,), 1e-4), torch.full((3,), 2e-4)]
    merged = pymerge.merge_tensors(base, models, "sce")
    torch.testing.assert_close(merged, torch.full((3,), 1.8e-4), rtol=1e-6, atol=0)
    merged = pymerge.merge_tensors(base, models, "sce", compat="mergekit")
    torch.testing.assert_close(merged, torch.full((3,), 1.5e-4), rtol=1e-6, atol=0)


def test_of_equal_variances_the_first_are_selected() -> None:
    base, models = torch.zeros(6), [torch.tensor([1.0, 0.0, 1.0, 3.0, 1.0, 1.0]), torch.zeros(6)]
    merged = pymerge.merge_tensors(base, models, "sce", select_topk=0.6)  # int(0.6 * 5) = 3 of them
    assert merged.tolist() == [1.0, 0.0, 1.0, 3.0, 0.0, 0.0]
    alone = pymerge.merge_tensors(base, models[:1], "sce", select_topk=0.6)
    assert alone.tolist() == [0.0] * 6  # one model does not vary: nothing is selected


def test_a_share_below_0_is_an_error() -> None:
    base, models = half_moved((4, 5), 2)
    with pytest.raises(ArgumentError, match=r"parameter 'select_topk' is -0\.5; it must be at least 0"):
        pymerge.merge_tensors(base, models, "sce", select_topk=-0.5)
