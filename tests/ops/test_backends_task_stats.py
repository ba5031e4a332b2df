"""task_stats in C++ against float64: the rule of pymerge.testing.compare, and exact zeros."""

from __future__ import annotations

import itertools

import pytest
import torch

from pymerge.backends.runner import load
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

REFERENCE = OPS["task_stats"].reference
RUNS = implementations("task_stats")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_task_stats(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    function = load(backend).implementations()["task_stats"]
    for dtypes in itertools.product(FLOATS, repeat=2):
        case = task_case(shape, [*dtypes, torch.float32], device=device, layout=layout)
        wide = case.to(torch.float64)
        actual = function(case.base, case.experts)
        baseline = REFERENCE(case.base, case.experts)
        truth = REFERENCE(wide.base, wide.experts)
        for name in ("norms", "traces", "means"):
            assert_accurate(
                f"{name} {dtypes}",
                getattr(actual, name),
                getattr(baseline, name),
                getattr(truth, name).double(),
            )


def test_constant_rows_have_no_centred_trace() -> None:
    """Every row equal: the mean explains all, and the trace is 0, not a rounding error."""
    function = load("native").implementations()["task_stats"]
    expert = torch.tensor([1e4, -3.3, 1e-7, 0.1]).repeat(77, 1)
    stats = function(torch.zeros_like(expert), [expert])
    assert stats.traces.tolist() == [0.0]
    assert_same("means", stats.means[0], expert[0])


def test_traces_survive_a_large_mean() -> None:
    """Deviations of 1e-3 on a mean of 1: sum of squares minus n mean^2 would lose six digits."""
    function = load("native").implementations()["task_stats"]
    generator = torch.Generator().manual_seed(3)
    expert = 1.0 + 1e-3 * torch.randn(500, 40, generator=generator)
    trace = function(torch.zeros_like(expert), [expert]).traces[0]
    exact = (expert.double() - expert.double().mean(dim=0)).square().sum()
    assert abs(float(trace - exact)) <= 1e-14 * float(exact) * 500


def test_non_finite_values_stay_in_their_column() -> None:
    function = load("native").implementations()["task_stats"]
    case = task_case((20, 300), [torch.float32] * 3)
    case.experts[0][3, 7] = float("nan")
    case.experts[1][4, 250] = float("inf")
    actual, expected = function(case.base, case.experts), REFERENCE(case.base, case.experts)
    assert torch.isnan(actual.means[0]).nonzero().tolist() == [[7]]
    assert torch.isinf(actual.means[1]).nonzero().tolist() == [[250]]
    for name in ("norms", "traces"):
        assert_same(f"kinds of {name}", getattr(actual, name).isnan(), getattr(expected, name).isnan())


def test_thread_count_does_not_change_task_stats() -> None:
    function = load("native").implementations()["task_stats"]
    case = task_case((400, 900), [torch.bfloat16] * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = function(case.base, case.experts)
    torch.set_num_threads(2)
    two = function(case.base, case.experts)
    torch.set_num_threads(threads)
    for name in ("norms", "traces", "means"):
        assert_same(name, getattr(two, name), getattr(one, name))
