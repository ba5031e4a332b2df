"""flow_to_length against the exponential of its system in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.flow_to_length import FlowToLength
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles_weir import length_delta

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide (products of rows are smaller), one row, one column, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (6, 60, 4), (1, 16, 3), (16, 1, 2), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    base, experts = uneven(*shape, dtype=dtype)
    expected = length_delta(as_float64(base), [as_float64(expert) for expert in experts])
    found = FlowToLength(base, experts).reference()
    assert found.dtype == torch.float64
    assert relative_error(as_float64(found), expected) < 1e-7


def uneven(rows: int, columns: int, tasks: int, dtype: torch.dtype = torch.float64):
    """Task vectors of which each is half as long again as the one before, with a part in common."""
    base, experts = make_weights(rows, columns, tasks, rms=0.02)
    shared = make_weights(rows, columns, 1, rms=0.02, seed=9)[1][0] - make_weights(rows, columns, 1, seed=9)[0]
    taus = [1.5**t * (expert - base + 0.5 * shared) for t, expert in enumerate(experts)]
    return base.to(dtype), [(base + tau).to(dtype) for tau in taus]


def test_it_is_as_long_as_a_task_and_nearer_to_each_beside_its_own_length() -> None:
    base, experts = uneven(24, 20, 4)
    taus = [expert - base for expert in experts]
    X = FlowToLength(base, experts).reference()
    length = math.sqrt(sum(float(tau.square().sum()) for tau in taus) / 4)
    assert float(X.norm()) == pytest.approx(length, rel=1e-6)

    def loss(delta: torch.Tensor) -> float:
        return sum(float(((delta - tau) @ tau.mT).square().sum() / tau.square().sum() ** 2) for tau in taus)

    assert loss(X) < 0.9 * loss(sum(taus) / 4)


def test_one_task_equal_tasks_untouched_ones_and_none() -> None:
    base, experts = make_weights(12, 10, 1, dtype=torch.float64)
    tau = experts[0] - base
    torch.testing.assert_close(FlowToLength(base, experts).reference(), tau, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(FlowToLength(base, experts * 3).reference(), tau, rtol=1e-9, atol=1e-15)
    base, experts = uneven(12, 10, 3)
    with_base = FlowToLength(base, [*experts, base]).reference()
    torch.testing.assert_close(with_base, FlowToLength(base, experts).reference(), rtol=0, atol=0)
    assert not FlowToLength(base, [base, base]).reference().any()


def test_a_flow_that_never_is_as_long_ends() -> None:
    """Opposite tasks: their mean is 0, where the loss is stationary, and stays."""
    base, experts = make_weights(9, 8, 1, dtype=torch.float64)
    tau = experts[0] - base
    found = FlowToLength(base, [base + tau, base - tau]).reference()
    assert float(found.norm()) < 1e-6 * float(tau.norm())


@pytest.mark.parametrize("shape", [(6, 24), (20, 12)], ids=str)
@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-7])
def test_a_task_that_hardly_touched_the_weight_does_not_undo_the_others(shape: tuple[int, int], ratio: float) -> None:
    """Its error beside its own change is bounded: X is as long as it shall be, and goes where the others go."""
    base, experts = uneven(*shape, 3)
    taus = [expert - base for expert in experts]
    taus[1] *= ratio
    X = FlowToLength(torch.zeros_like(base), taus).reference()
    expected = length_delta(np.zeros(shape), [as_float64(tau) for tau in taus])
    assert relative_error(as_float64(X), expected) < 1e-6
    length = math.sqrt(sum(float(tau.square().sum()) for tau in taus) / 3)
    assert float(X.norm()) == pytest.approx(length, rel=1e-6)
    others = length_delta(np.zeros(shape), [as_float64(taus[0]), as_float64(taus[2])])
    cosine = np.sum(as_float64(X) * others) / np.linalg.norm(as_float64(X)) / np.linalg.norm(others)
    assert cosine > 0.85


@pytest.mark.parametrize("factor", [1e-200, 1e-6, 1e6, 1e160])
def test_it_scales_with_the_task_vectors(factor: float) -> None:
    base, experts = uneven(20, 30, 3)
    X = FlowToLength(torch.zeros_like(base), [expert - base for expert in experts]).reference()
    scaled = FlowToLength(torch.zeros_like(base), [factor * (expert - base) for expert in experts]).reference()
    assert relative_error(as_float64(scaled) / factor, as_float64(X)) < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = uneven(20, 12, 3)
    expected = FlowToLength(base, experts).reference()
    found = FlowToLength(lay_out(base, layout), [lay_out(expert, layout) for expert in experts]).reference()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def test_arrays_a_backend_without_it_and_no_elements() -> None:
    base, experts = uneven(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), FlowToLength(base, experts)
    assert_same("X", run(op), op.reference())
    assert run.choices["flow_to_length"].backend == "reference"
    arrays = FlowToLength(Array.of(base), [Array.of(expert) for expert in experts])
    assert_same("arrays", run(arrays), op.reference())
    for shape in ((0, 4), (4, 0)):
        assert np.array_equal(FlowToLength(torch.zeros(shape), [torch.zeros(shape)]).reference(), np.zeros(shape))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"flow_to_length: expert 0 has shape \(4, 3\), the base \(3, 4\)"):
        FlowToLength(torch.zeros(3, 4), [torch.zeros(4, 3)]).check()
