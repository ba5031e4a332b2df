"""task_sum of every backend against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.task_sum import TaskSum
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = [1.0, 0.3]


@pytest.mark.parametrize(("backend", "device"), implementations("task_sum"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
def test_task_sum(backend: str, device: str, shape: tuple[int, int], layout: str, centred: bool) -> None:
    run = Runner(backend, device)
    for dtypes in itertools.product(FLOATS, repeat=2):
        case = task_case(shape, [*dtypes, torch.float32], device=device, layout=layout)
        wide = case.to(torch.float64)
        means = torch.stack([(e - wide.base).mean(dim=0) for e in wide.experts]).float() if centred else None
        truth = TaskSum(wide.base, wide.experts, WEIGHTS, means).reference()
        for dtype in ("F32", "F64"):
            op = TaskSum(case.base, case.experts, WEIGHTS, means, dtype)
            assert_accurate(f"{dtypes} in {dtype}", run(op), op.reference(), truth)


@pytest.mark.parametrize(("backend", "device"), implementations("task_sum"))
def test_one_task_of_weight_one_is_its_task_vector(backend: str, device: str) -> None:
    case = task_case((37, 51), [torch.bfloat16, torch.float16], device=device)
    found = Runner(backend, device)(TaskSum(case.base, case.experts, [1.0]))
    assert_same("tau", found, case.experts[0].float() - case.base.float())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", [(7, 33), (0, 5), (5, 0)])
def test_arrays_give_the_bits_of_tensors(backend: str, shape: tuple[int, int]) -> None:
    case = task_case(shape, [torch.bfloat16, torch.float16, torch.float32])
    run = Runner(backend)
    expected = run(TaskSum(case.base, case.experts, WEIGHTS))
    found = run(TaskSum(Array.of(case.base), [Array.of(expert) for expert in case.experts], WEIGHTS))
    assert_same("sum", found, expected)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *implementations("task_sum")])
def test_not_a_number_stays_at_its_element(backend: str, device: str) -> None:
    case = task_case((20, 300), [torch.float32] * 3, device=device)
    case.experts[0][3, 7] = float("nan")
    found = Runner(backend, device)(TaskSum(case.base, case.experts, WEIGHTS))
    assert found.isnan().nonzero().tolist() == [[3, 7]]


def test_same_bits_for_any_number_of_threads() -> None:
    case = task_case((400, 900), [torch.bfloat16] * 3)
    run, op = Runner("native"), TaskSum(case.base, case.experts, WEIGHTS)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(op))
    torch.set_num_threads(threads)
    assert_same("2 threads", results[1], results[0])


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="task_sum: 1 weights for 2 experts"):
        TaskSum(base, [base, base], [1.0]).check()
    with pytest.raises(ArgumentError, match=r"task_sum: means has shape \(2, 4\), expected \(1, 4\)"):
        TaskSum(base, [base], [1.0], torch.zeros(2, 4)).check()
    for dtype in ("BF16", torch.bfloat16):
        with pytest.raises(ArgumentError, match=f"task_sum: dtype {dtype} is not float32 or float64"):
            TaskSum(base, [base], [1.0], None, dtype).check()
