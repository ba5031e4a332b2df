"""temper_spectrum against its formula in float64, one direction after the other."""

from __future__ import annotations

import math

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.temper_spectrum import TemperSpectrum
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles_weir import tempered

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (1, 16, 3), (16, 1, 2), (12, 10, 1)]


def taus_of(base, experts):
    return [as_float64(expert.double() - base.double()) for expert in experts]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("most", [1.0, 1.75, math.inf])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, most: float) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    taus = taus_of(base, experts)
    X = torch.from_numpy(sum((1 + t) * tau for t, tau in enumerate(taus)) / 3)
    found = TemperSpectrum(X, base, experts, most).reference()
    assert found.dtype == torch.float64
    assert relative_error(as_float64(found), tempered(as_float64(X), taus, most)) < 1e-9
    assert TemperSpectrum(X.float(), base, experts, most).reference().dtype == torch.float32


@pytest.mark.parametrize("most", [1.0, 1.5, math.inf])
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_of_what_is_above_the_crest_only_what_tasks_agree_on_is_kept(most: float, shared: float) -> None:
    """One large direction: the first task's alone, or in part or wholly that of all."""
    base, experts = make_weights(30, 20, 3, dtype=torch.float64)
    large = 0.05 * torch.outer(torch.ones(30).double(), torch.ones(20).double())
    experts = [expert + (1.0 if place == 0 else shared) * large for place, expert in enumerate(experts)]
    taus = taus_of(base, experts)
    X = torch.from_numpy(sum(taus) / 3)
    whole = as_float64(TemperSpectrum(X, base, experts).reference())
    found = as_float64(TemperSpectrum(X, base, experts, most).reference())
    assert relative_error(found, tempered(as_float64(X), taus, most)) < 1e-9
    lost = relative_error(found, whole)
    bounds = {0.0: (0.3, 1), 0.5: (0.1, 0.5), 1.0: (1e-7, 1e-4)}[shared] if math.isfinite(most) else (-1, 1e-12)
    assert bounds[0] < lost < bounds[1]


@pytest.mark.parametrize("most", [1.0, 1.75, math.inf])
@pytest.mark.parametrize("tasks", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_task_and_equal_tasks_come_back(most: float, tasks: int, scale: float) -> None:
    """Whatever X has of them, down to 1 / T of it."""
    base, experts = make_weights(30, 20, 1, dtype=torch.float64)
    tau = experts[0] - base + 0.02
    found = TemperSpectrum(scale * tau, base, [base + tau] * tasks, most).reference()
    torch.testing.assert_close(found, tau, rtol=1e-9, atol=1e-12)
    average = TemperSpectrum(tau / tasks, base, [base + tau] * tasks, most).reference()
    torch.testing.assert_close(average, tau, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-40, 1e-9, 1e9])
def test_the_size_of_the_deltas_changes_nothing_else(size: float) -> None:
    """Nor do tasks without any response in some directions."""
    base, experts = make_weights(24, 16, 3, dtype=torch.float64)
    taus = [expert - base for expert in experts]
    taus[0][:8] = 0.0
    taus[1][8:] = 0.0
    zero = torch.zeros_like(base)
    expected = tempered(as_float64(sum(taus)), [as_float64(tau) for tau in taus], 1.25)
    X = TemperSpectrum(size * sum(taus), zero, [size * tau for tau in taus], 1.25).reference() / size
    assert relative_error(as_float64(X), expected) < 1e-9


def test_a_task_that_hardly_touched_the_weight_counts_for_little() -> None:
    """Calibration by the mean of each task's part would divide by next to nothing."""
    base, experts = make_weights(24, 16, 3, dtype=torch.float64)
    X = sum(expert - base for expert in experts[:2])
    hardly = base + 1e-4 * (experts[2] - base)
    expected = TemperSpectrum(X, base, [*experts[:2], base]).reference()
    found = TemperSpectrum(X, base, [*experts[:2], hardly]).reference()
    assert relative_error(as_float64(found), as_float64(expected)) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    X = sum(expert.double() - base.double() for expert in experts)
    expected = TemperSpectrum(X, base, experts, 1.5).reference()
    laid = [lay_out(expert, layout) for expert in experts]
    found = TemperSpectrum(lay_out(X, layout), lay_out(base, layout), laid, 1.5).reference()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_deltas_of_zero_low_rank_and_no_elements() -> None:
    base, experts = make_weights(6, 4, 2, dtype=torch.float64)
    zero = torch.zeros(6, 4, dtype=torch.float64)
    assert_same("X", TemperSpectrum(zero, base, experts, 1.75).reference(), zero)
    assert TemperSpectrum(experts[0] - base, base, [base, base], 1.75).reference().isfinite().all()
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", TemperSpectrum(empty, empty, [empty + 1, empty], 1.75).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    X = sum(expert.double() - base.double() for expert in experts)
    run, op = Runner("native"), TemperSpectrum(X, base, experts, 1.75)
    assert_same("X", run(op), op.reference())
    assert run.choices["temper_spectrum"].backend == "reference"
    arrays = TemperSpectrum(Array.of(X), Array.of(base), [Array.of(expert) for expert in experts], 1.75)
    assert_same("arrays", run(arrays), op.reference())


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"temper_spectrum: delta has shape \(4, 3\), expected \(3, 4\)"):
        TemperSpectrum(torch.zeros(4, 3), base, [base]).check()
    with pytest.raises(ArgumentError, match=r"temper_spectrum: most is 0.5; give a number of at least 1"):
        TemperSpectrum(base, base, [base], 0.5).check()
