"""arcee_fusion against its float64 form."""

from __future__ import annotations

import pytest
import torch

import pymerge
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.testing.compare import as_float64
from tests.helpers import oracles_mergekit as oracles
from tests.helpers.methods import (
    BACKENDS,
    DTYPES,
    SHAPES,
    check,
    check_empty,
    check_float64,
    check_untouched,
    half_moved,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], backend: str) -> None:
    for dtype in DTYPES:
        base, models = half_moved(shape, 1, dtype)
        found = pymerge.merge_tensors(base, models, "arcee_fusion", backend=backend)
        assert found.dtype == dtype
        if len(shape) > 1 and dtype == torch.float32:  # elements at the threshold may go either way
            check(found, oracles.arcee_fusion(as_float64(base), as_float64(models[0])), 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_and_empty_tensors(backend: str) -> None:
    check_float64("arcee_fusion", backend, lambda W0, Ws: oracles.arcee_fusion(W0, Ws[0]))
    check_empty("arcee_fusion", backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_tensors_come_back(dtype: torch.dtype) -> None:
    check_untouched("arcee_fusion", dtype)


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 6])
def test_quartiles_of_a_few_elements(numel: int) -> None:
    """The least of all is a quartile where there are less than five."""
    base, (model,) = half_moved((numel,), 1, rms=1.0)
    found = pymerge.merge_tensors(base, [model], "arcee_fusion")
    check(found, oracles.arcee_fusion(as_float64(base), as_float64(model)))


def test_what_is_not_finite_need_not_be_in_the_result() -> None:
    """So the inputs are looked at."""
    method = METHODS["arcee_fusion"]
    assert not method.action("x", True, method.defaults(1), 1).shows_nonfinite


def test_it_merges_one_model() -> None:
    base, models = half_moved((4, 5), 3)
    with pytest.raises(ArgumentError, match="'arcee_fusion' merges exactly 1 model beside the base, and 3 are listed"):
        pymerge.merge_tensors(base, models, "arcee_fusion")
