"""calibrate (SVC) against the published loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.calibrate import Calibrate
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import below_crest, calibrated

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


@pytest.mark.parametrize("most", [1.0, 1.5, math.inf])
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_of_what_is_above_the_crest_only_what_tasks_agree_on_is_kept(most: float, shared: float) -> None:
    """One large direction: the first task's alone, or in part or wholly that of all."""
    base, experts = make_weights(30, 20, 3, dtype=torch.float64)
    large = 0.05 * torch.outer(torch.ones(30).double(), torch.ones(20).double())
    experts = [expert + (1.0 if place == 0 else shared) * large for place, expert in enumerate(experts)]
    X = total(base, experts) / 3
    whole = as_float64(Calibrate(X, base, experts, 1 / 3).reference())
    found = as_float64(Calibrate(X, base, experts, 1 / 3, most).reference())
    expected = below_crest(whole, [as_float64(expert - base) for expert in experts], most, 20)
    assert relative_error(found, expected) < 1e-9
    lost = relative_error(found, whole)
    bounds = {0.0: (0.3, 1), 0.5: (0.1, 0.5), 1.0: (1e-7, 1e-4)}[shared] if math.isfinite(most) else (-1, 1e-12)
    assert bounds[0] < lost < bounds[1]


@pytest.mark.parametrize("most", [1.0, 1.75])
def test_equal_tasks_come_back_whatever_the_crest(most: float) -> None:
    base, experts = make_weights(30, 20, 1, dtype=torch.float64)
    tau = experts[0] - base + 0.02
    experts = [base + tau] * 4
    found = Calibrate(4 * tau, base, experts, 1 / 4, most).reference()
    torch.testing.assert_close(found, tau, rtol=1e-9, atol=1e-12)
    assert not Calibrate(torch.zeros(30, 20), base, experts, 0.5, most).reference().any()


@pytest.mark.parametrize("size", [1e-40, 1e-9, 1e9])
def test_with_rounding_the_size_of_the_deltas_changes_nothing_else(size: float) -> None:
    base, experts = make_weights(24, 16, 3, dtype=torch.float64)
    taus = [expert - base for expert in experts]
    taus[0][:8] = 0.0
    taus[1][8:] = 0.0
    zero = torch.zeros_like(base)
    expected = calibrated(as_float64(sum(taus)), 0.0, [as_float64(tau) for tau in taus], 1 / 3, tiny=0.0)
    X = Calibrate(size * sum(taus), zero, [size * tau for tau in taus], 1 / 3, rounding=2.0**-23).reference() / size
    assert relative_error(as_float64(X), expected) < 1e-9


def test_with_rounding_a_response_that_is_rounding_is_none() -> None:
    """Two tasks on rows of their own: what the other has in a direction is 0, or as good as 0, and counts as alpha."""
    base, noise = torch.zeros(2, 2, dtype=torch.float64), 1e-12
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    tasks = [
        torch.tensor([[2.0, 0.0], [noise, 0.0]], dtype=torch.float64),
        torch.tensor([[noise, 0.0], [0.0, 1.0]], dtype=torch.float64),
    ]
    found = Calibrate(X, base, tasks, 0.5, rounding=2.0**-23).reference()
    torch.testing.assert_close(found, X * 2 / 1.5, rtol=1e-9, atol=1e-9)


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
    with pytest.raises(ArgumentError, match=r"calibrate: most is 0.5; give a number of at least 1"):
        Calibrate(base, base, [base, base], 1.0, 0.5).check()
    with pytest.raises(ArgumentError, match=r"calibrate: most is 2.0 for one task, which agrees with nobody"):
        Calibrate(base, base, [base], 1.0, 2.0).check()
    with pytest.raises(ArgumentError, match=r"calibrate: rounding is -1.0; give a number of at least 0, or None"):
        Calibrate(base, base, [base], rounding=-1.0).check()
