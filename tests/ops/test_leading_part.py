"""leading_part against numpy's singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.leading_part import LeadingPart
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import leading

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(7, 9), (48, 32), (20, 48), (1, 16), (16, 1)]


def delta(rows: int, columns: int, rank: int | None = None) -> torch.Tensor:
    base, (expert,) = make_weights(rows, columns, 1, rank=rank, dtype=torch.float64)
    return expert - base


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("restored", [False, True])
def test_reference(shape: tuple[int, int], restored: bool) -> None:
    X = delta(*shape)
    for rank in (1, min(shape), 1000):
        found = as_float64(LeadingPart(X, rank, restored=restored).reference())
        assert relative_error(found, leading(as_float64(X), rank, restored)) < 1e-9
    for total in (1e-9, 0.4, 0.9, 1.0):
        values = np.linalg.svd(as_float64(X), compute_uv=False)
        count = next(i for i in range(len(values)) if values[: i + 1].sum() >= total * values.sum() * (1 - 1e-12)) + 1
        found = as_float64(LeadingPart(X, total=total, restored=restored).reference())
        wanted = leading(as_float64(X), count)
        wanted = wanted * values.sum() / values[:count].sum() if restored else wanted
        assert relative_error(found, wanted) < 1e-9
    single = LeadingPart(X.float(), total=0.4).reference()
    assert single.dtype == torch.float32


def test_no_direction_nothing_and_no_elements() -> None:
    X = delta(6, 4)
    assert not LeadingPart(X, 0).reference().any()
    for shape in ((6, 4), (0, 4), (4, 0)):
        for restored in (False, True):
            assert_same(
                "X", LeadingPart(torch.zeros(shape), total=0.5, restored=restored).reference(), torch.zeros(shape)
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    X = delta(20, 12)
    expected = LeadingPart(X, 3).reference()
    torch.testing.assert_close(LeadingPart(lay_out(X, layout), 3).reference(), expected, rtol=1e-9, atol=1e-12)


def test_arrays_and_a_backend_without_it() -> None:
    run, op = Runner("native"), LeadingPart(delta(12, 10), 4)
    assert_same("X", run(op), op.reference())
    assert run.choices["leading_part"].backend == "reference"
    assert_same("arrays", run(LeadingPart(Array.of(op.delta), 4)), op.reference())


def test_bad_arguments_are_named() -> None:
    X = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"leading_part: the matrix has shape \(4,\), expected 2 dimensions"):
        LeadingPart(torch.zeros(4), 1).check()
    for given in ({}, {"rank": 1, "total": 0.5}):
        with pytest.raises(ArgumentError, match="leading_part: give a rank, or a share"):
            LeadingPart(X, **given).check()
    with pytest.raises(ArgumentError, match="rank is -1; give at least 0"):
        LeadingPart(X, -1).check()
    with pytest.raises(ArgumentError, match=r"total is 1\.5; give a share above 0 up to 1"):
        LeadingPart(X, total=1.5).check()
