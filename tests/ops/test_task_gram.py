"""task_gram on every compiled backend, against float64 and the reference's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.native import _products
from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import LAYOUTS, SHAPES, TaskCase, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = (0.7, 0.0, 2.5)
RUNS = implementations("task_gram")
MIXES = ((torch.bfloat16,) * 4, (torch.float32, torch.float16, torch.float32, torch.bfloat16))


def column_means(case: TaskCase) -> Tensor:
    """[T, d_in]; of no rows, 0."""
    return TaskStats(case.base, case.experts).reference().means


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtypes", MIXES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_task_gram(
    backend: str, device: str, dtypes: tuple[torch.dtype, ...], centred: bool, shape: tuple[int, int]
) -> None:
    run = Runner(backend, device)
    case = task_case(shape, dtypes, device=device)
    means = column_means(case) if centred else None
    wide = case.to(torch.float64)
    truth = TaskGram(wide.base, wide.experts, WEIGHTS, means, "F64").reference()
    actual = run(TaskGram(case.base, case.experts, WEIGHTS, means))
    assert_accurate("S", actual, TaskGram(case.base, case.experts, WEIGHTS, means).reference(), truth)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_gram_layouts(backend: str, device: str, layout: str) -> None:
    run = Runner(backend, device)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    packed = task_case((63, 65), dtypes, device=device)
    case = task_case((63, 65), dtypes, device=device, layout=layout)
    means = column_means(packed)
    expected = run(TaskGram(packed.base, packed.experts, WEIGHTS, means))
    assert_same(layout, run(TaskGram(case.base, case.experts, WEIGHTS, means)), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_of_no_task_is_zero(backend: str, device: str) -> None:
    run = Runner(backend, device)
    case = task_case((6, 9), [torch.float32] * 3, device=device)
    case.experts[1][0, 0] = float("nan")
    assert_same("S", run(TaskGram(case.base, case.experts, [0.0, 0.0])), torch.zeros(9, 9, device=device))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_puts_nan_in_one_row_and_column(backend: str, device: str) -> None:
    run = Runner(backend, device)
    case = task_case((20, 70), [torch.float32] * 2, device=device)
    case.experts[0][3, 66] = float("nan")
    expected = torch.zeros(70, 70, dtype=torch.bool, device=device)
    expected[66, :] = expected[:, 66] = True
    assert_same("NaN", run(TaskGram(case.base, case.experts, [1.0])).isnan(), expected)


def halves(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hi, lo) of a float32 matrix, in float64: its value in a 16-bit dtype, and what is left, in it too."""
    hi = matrix.to(dtype).double()
    return hi, (matrix.double() - hi).to(dtype).double()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lo", [False, True])
def test_task_gram_of_16_bit_weights_has_exact_products(
    backend: str, device: str, dtype: torch.dtype, with_lo: bool
) -> None:
    """Weights near the base's give deltas of 16 bits; tiny bases among them give deltas that need two such numbers."""
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(3)
    base = (1.0 + torch.rand(50, 70, generator=generator)).to(dtype)
    expert = (base.float() * (1.0 + 0.05 * torch.rand(50, 70, generator=generator))).to(dtype)
    if with_lo:
        base[::7, ::3] *= 2.0**-5
    base, expert = base.to(device), expert.to(device)
    tau = expert.float() - base.float()
    hi, lo = halves(tau, dtype)
    assert bool((lo != 0).any()) == with_lo
    truth = tau.double().mT @ tau.double()
    actual = run(TaskGram(base, [expert], [1.0]))
    assert_accurate("S", actual, TaskGram(base, [expert], [1.0]).reference(), truth)
    if with_lo:
        lost = [(part - truth).abs().max() for part in (hi.mT @ hi, truth - lo.mT @ lo)]  # by one product, by three
        error = (actual.double() - truth).abs().max()
        assert error < 0.01 * lost[0]
        assert dtype == torch.float16 or error < 0.5 * lost[1]  # float16's is below float32's rounding


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_task_gram_of_extreme_weights(backend: str, device: str, dtype: torch.dtype) -> None:
    """Deltas that leave float16's range, infinite ones, NaN, and ones below the smallest normal number."""
    run = Runner(backend, device)
    base, expert = torch.zeros(5, 9, dtype=dtype, device=device), torch.ones(5, 9, dtype=dtype, device=device)
    base[0, 0], expert[0, 0] = -60000.0, 60000.0
    base[3, 8] = 0.0123  # a delta of two parts beside the infinite ones
    expert[1, 2], base[1, 3] = float("inf"), float("inf")
    expert[2, 4] = float("nan")
    expert[:, 6], expert[:, 7] = 6e-8, torch.finfo(dtype).smallest_normal
    truth = TaskGram(base.double(), [expert.double()], [1.0]).reference()
    actual = run(TaskGram(base, [expert], [1.0]))
    assert_accurate("S", actual, TaskGram(base, [expert], [1.0]).reference(), truth)
    assert actual[0, 0].isfinite()
    tiny = actual[6, 6].item() / truth[6, 6].item()
    assert abs(tiny - 1.0) < 1e-6


@pytest.mark.parametrize("columns", [63, 64, 65, 100, 129])
def test_panels_of_the_lower_triangle(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Sizes around the panels' edges, with panels made small; the mirrored half must be the computed one."""
    monkeypatch.setattr(_products, "_HALF_FROM", 64)
    monkeypatch.setattr(_products, "_PANEL", 32)
    case = task_case((9, columns), [torch.float32] * 3)
    wide = case.to(torch.float64)
    weights = [1.0, 0.5]
    run = Runner("native")
    actual = run(TaskGram(case.base, case.experts, weights))
    assert_accurate(
        "S",
        actual,
        TaskGram(case.base, case.experts, weights).reference(),
        TaskGram(wide.base, wide.experts, weights).reference(),
    )
    assert_same("A", run(NormalEquations(case.base, case.experts, weights)).A, actual)
    if columns >= 64:
        assert_same("mirrored panel", actual[:32, 32:], actual[32:, :32].mT)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays_give_the_bits_of_tensors(backend: str) -> None:
    case = task_case((7, 33), MIXES[1])
    run = Runner(backend)
    expected = run(TaskGram(case.base, case.experts, WEIGHTS))
    assert_same("S", run(TaskGram(Array.of(case.base), [Array.of(e) for e in case.experts], WEIGHTS)), expected)
