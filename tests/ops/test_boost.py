"""boost (Subspace-Boosting) against the published form in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.boost import Boost
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import boosted

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(7, 9), (48, 32), (20, 48), (1, 16), (16, 1)]


def delta(rows: int, columns: int, rank: int | None = None) -> torch.Tensor:
    base, (expert,) = make_weights(rows, columns, 1, rank=rank, dtype=torch.float64)
    return expert - base


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.8, 1.0])
def test_reference(shape: tuple[int, int], beta: float) -> None:
    X = delta(*shape)
    found = Boost(X, beta).reference()
    assert relative_error(as_float64(found), boosted(as_float64(X), beta)) < 1e-8
    single = Boost(X.float(), beta).reference()
    assert single.dtype == torch.float32
    assert relative_error(as_float64(single), boosted(as_float64(X), beta)) < 1e-3


def test_all_of_it_changes_nothing_and_none_of_it_makes_all_directions_equal() -> None:
    X = delta(12, 20)
    torch.testing.assert_close(Boost(X, 1.0).reference(), X, rtol=1e-9, atol=1e-12)
    s = np.linalg.svd(as_float64(Boost(X, 0.0).reference()), compute_uv=False)
    np.testing.assert_allclose(s, np.linalg.norm(as_float64(X), 2), rtol=1e-9)


def test_directions_that_are_rounding_stay_zero() -> None:
    X = delta(20, 16, rank=3)
    noise = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Boost(X, 0.0).reference()
    assert relative_error(as_float64(Boost(X + 1e-13 * noise, 0.0).reference()), as_float64(found)) < 1e-6
    assert np.linalg.matrix_rank(as_float64(found), tol=1e-6 * float(found.norm())) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    X = delta(20, 12)
    torch.testing.assert_close(Boost(lay_out(X, layout)).reference(), Boost(X).reference(), rtol=1e-9, atol=1e-12)


def test_deltas_of_zero_and_of_no_elements() -> None:
    for shape in ((6, 4), (0, 4), (4, 0)):
        assert_same("X", Boost(torch.zeros(shape)).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    X = delta(12, 10)
    run, op = Runner("native"), Boost(X)
    assert_same("X", run(op), op.reference())
    assert run.choices["boost"].backend == "reference"
    assert_same("arrays", run(Boost(Array.of(X))), op.reference())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"boost: the delta has shape \(4,\), expected 2 dimensions"):
        Boost(torch.zeros(4)).check()
    for beta in (-0.1, 1.5):
        with pytest.raises(ArgumentError, match=r"boost: beta is .*; give a share from 0 to 1"):
            Boost(torch.zeros(3, 4), beta).check()
