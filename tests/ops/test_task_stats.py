"""task_stats in C++ against float64: the rule of pymerge.testing.compare, exact zeros, arrays."""

from __future__ import annotations

import itertools

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

RUNS = implementations("task_stats")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_task_stats(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    run = Runner(backend, device)
    for dtypes in itertools.product(FLOATS, repeat=2):
        case = task_case(shape, [*dtypes, torch.float32], device=device, layout=layout)
        wide = case.to(torch.float64)
        actual = run(TaskStats(case.base, case.experts))
        baseline = TaskStats(case.base, case.experts).reference()
        truth = TaskStats(wide.base, wide.experts).reference()
        for name in ("norms", "traces", "means"):
            assert_accurate(
                f"{name} {dtypes}",
                getattr(actual, name),
                getattr(baseline, name),
                getattr(truth, name).double(),
            )


def test_constant_rows_have_no_centred_trace() -> None:
    """Every row equal: the mean explains all, and the trace is 0, not a rounding error."""
    expert = torch.tensor([1e4, -3.3, 1e-7, 0.1]).repeat(77, 1)
    stats = Runner("native")(TaskStats(torch.zeros_like(expert), [expert]))
    assert stats.traces.tolist() == [0.0]
    assert_same("means", stats.means[0], expert[0])


def test_traces_survive_a_large_mean() -> None:
    """Deviations of 1e-3 on a mean of 1: sum of squares minus n mean^2 would lose six digits."""
    generator = torch.Generator().manual_seed(3)
    expert = 1.0 + 1e-3 * torch.randn(500, 40, generator=generator)
    trace = Runner("native")(TaskStats(torch.zeros_like(expert), [expert])).traces[0]
    exact = (expert.double() - expert.double().mean(dim=0)).square().sum()
    assert abs(float(trace - exact)) <= 1e-14 * float(exact) * 500


def test_non_finite_values_stay_in_their_column() -> None:
    case = task_case((20, 300), [torch.float32] * 3)
    case.experts[0][3, 7] = float("nan")
    case.experts[1][4, 250] = float("inf")
    op = TaskStats(case.base, case.experts)
    actual, expected = Runner("native")(op), op.reference()
    assert torch.isnan(actual.means[0]).nonzero().tolist() == [[7]]
    assert torch.isinf(actual.means[1]).nonzero().tolist() == [[250]]
    for name in ("norms", "traces"):
        assert_same(f"kinds of {name}", getattr(actual, name).isnan(), getattr(expected, name).isnan())


def test_thread_count_does_not_change_task_stats() -> None:
    case = task_case((400, 900), [torch.bfloat16] * 4)
    run, op = Runner("native"), TaskStats(case.base, case.experts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = run(op)
    torch.set_num_threads(2)
    two = run(op)
    torch.set_num_threads(threads)
    for name in ("norms", "traces", "means"):
        assert_same(name, getattr(two, name), getattr(one, name))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", [(7, 33), (0, 5), (5, 0)])
def test_arrays_give_the_bits_of_tensors(backend: str, shape: tuple[int, int]) -> None:
    case = task_case(shape, [torch.bfloat16, torch.float16, torch.float32])
    run = Runner(backend)
    expected = run(TaskStats(case.base, case.experts))
    found = run(TaskStats(Array.of(case.base), [Array.of(expert) for expert in case.experts]))
    for name in ("norms", "traces", "means"):
        assert_same(name, getattr(found, name), getattr(expected, name))


def test_what_are_no_matrices_of_one_shape_is_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"task_stats: the base has shape \(4,\), expected 2 dimensions"):
        TaskStats(base[0], [base[0]]).check()
    with pytest.raises(ArgumentError, match=r"task_stats: expert 0 has shape \(3,\), the base \(3, 4\)"):
        TaskStats(base, [base[:, 0]]).check()
