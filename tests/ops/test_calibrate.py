"""calibrate (SVC) against the published loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.calibrate import Calibrate
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import calibrated

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (1, 16, 3), (16, 1, 2), (12, 10, 1)]


def total(base, experts):
    return sum(expert.double() - base.double() for expert in experts)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, alpha: float) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    X = total(base, experts)
    expected = calibrated(as_float64(X), as_float64(base), [as_float64(expert) for expert in experts], alpha)
    found = Calibrate(X, base, experts, alpha).reference()
    assert found.dtype == torch.float64
    assert relative_error(as_float64(found), expected) < 1e-9
    assert Calibrate(X.float(), base, experts, alpha).reference().dtype == torch.float32


def test_one_task_and_equal_tasks() -> None:
    base, experts = make_weights(12, 10, 1, dtype=torch.float64)
    tau = experts[0] - base
    torch.testing.assert_close(Calibrate(tau, base, experts).reference(), tau, rtol=1e-9, atol=1e-12)
    for scale in (2.0, 5.0):  # what tasks agree on is counted once
        found = Calibrate(scale * tau, base, experts * 3).reference()
        torch.testing.assert_close(found, tau, rtol=1e-9, atol=1e-12)
    grown = Calibrate(tau / 3, base, experts * 3, alpha=1 / 3).reference()  # of an average
    torch.testing.assert_close(grown, tau, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    X = total(base, experts)
    expected = Calibrate(X, base, experts).reference()
    laid = [lay_out(expert, layout) for expert in experts]
    found = Calibrate(lay_out(X, layout), lay_out(base, layout), laid).reference()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_deltas_of_zero_low_rank_and_no_elements() -> None:
    base, experts = make_weights(6, 4, 2, dtype=torch.float64)
    zero = torch.zeros(6, 4, dtype=torch.float64)
    assert_same("X", Calibrate(zero, base, experts).reference(), zero)
    assert Calibrate(experts[0] - base, base, [base, base]).reference().isfinite().all()
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", Calibrate(empty, empty, [empty + 1, empty]).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    X = total(base, experts)
    run, op = Runner("native"), Calibrate(X, base, experts)
    assert_same("X", run(op), op.reference())
    assert run.choices["calibrate"].backend == "reference"
    arrays = Calibrate(Array.of(X), Array.of(base), [Array.of(expert) for expert in experts])
    assert_same("arrays", run(arrays), op.reference())
    assert np.linalg.norm(as_float64(run(op))) <= np.linalg.norm(as_float64(X))  # alpha 1 only shrinks


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"calibrate: delta has shape \(4, 3\), expected \(3, 4\)"):
        Calibrate(torch.zeros(4, 3), base, [base]).check()
    with pytest.raises(ArgumentError, match=r"calibrate: alpha is 0.0; give a number above 0"):
        Calibrate(base, base, [base], 0.0).check()
