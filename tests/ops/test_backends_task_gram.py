"""task_gram and normal_equations on every compiled backend, against float64 and the reference's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends import load, native
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, TaskCase, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

GRAM = OPS["task_gram"].reference
EQUATIONS = OPS["normal_equations"].reference
WEIGHTS = (0.7, 0.0, 2.5)
RUNS = implementations("task_gram")
MIXES = ((torch.bfloat16,) * 4, (torch.float32, torch.float16, torch.float32, torch.bfloat16))


def column_means(case: TaskCase) -> Tensor:
    """[T, d_in]; of no rows, 0."""
    return OPS["task_stats"].reference(case.base, case.experts).means


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtypes", MIXES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_task_gram(
    backend: str, device: str, dtypes: tuple[torch.dtype, ...], centred: bool, shape: tuple[int, int]
) -> None:
    function = load(backend).implementations()["task_gram"]
    case = task_case(shape, dtypes, device=device)
    means = column_means(case) if centred else None
    wide = case.to(torch.float64)
    truth = GRAM(wide.base, wide.experts, WEIGHTS, means, torch.float64)
    actual = function(case.base, case.experts, WEIGHTS, means)
    assert_accurate("S", actual, GRAM(case.base, case.experts, WEIGHTS, means), truth)
    if backend != "native":
        assert_same("symmetry", actual, actual.mT)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_gram_layouts(backend: str, device: str, layout: str) -> None:
    function = load(backend).implementations()["task_gram"]
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    packed = task_case((63, 65), dtypes, device=device)
    case = task_case((63, 65), dtypes, device=device, layout=layout)
    means = column_means(packed)
    expected = function(packed.base, packed.experts, WEIGHTS, means)
    assert_same(layout, function(case.base, case.experts, WEIGHTS, means), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_of_no_task_is_zero(backend: str, device: str) -> None:
    function = load(backend).implementations()["task_gram"]
    case = task_case((6, 9), [torch.float32] * 3, device=device)
    case.experts[1][0, 0] = float("nan")
    assert_same("S", function(case.base, case.experts, [0.0, 0.0]), torch.zeros(9, 9, device=device))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_puts_nan_in_one_row_and_column(backend: str, device: str) -> None:
    function = load(backend).implementations()["task_gram"]
    case = task_case((20, 70), [torch.float32] * 2, device=device)
    case.experts[0][3, 66] = float("nan")
    expected = torch.zeros(70, 70, dtype=torch.bool, device=device)
    expected[66, :] = expected[:, 66] = True
    assert_same("NaN", function(case.base, case.experts, [1.0]).isnan(), expected)


@pytest.mark.parametrize("columns", [63, 64, 65, 100, 129])
def test_panels_of_the_lower_triangle(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Sizes around the panels' edges, with panels made small; the mirrored half must be the computed one."""
    monkeypatch.setattr(native, "_HALF_FROM", 64)
    monkeypatch.setattr(native, "_PANEL", 32)
    case = task_case((9, columns), [torch.float32] * 3)
    wide = case.to(torch.float64)
    weights = [1.0, 0.5]
    actual = native.task_gram(case.base, case.experts, weights)
    assert_accurate("S", actual, GRAM(case.base, case.experts, weights), GRAM(wide.base, wide.experts, weights))
    assert_same("A", native.normal_equations(case.base, case.experts, weights).A, actual)
    if columns >= 64:
        assert_same("mirrored panel", actual[:32, 32:], actual[32:, :32].mT)


@pytest.mark.parametrize(("backend", "device"), implementations("normal_equations"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_equations(
    backend: str, device: str, dtype: torch.dtype, centred: bool, with_origin: bool, shape: tuple[int, int]
) -> None:
    function = load(backend).implementations()["normal_equations"]
    case = task_case(shape, [dtype] * 4, device=device)
    means = column_means(case) if centred else None
    origin = case.experts[2].float() - case.base.float() if with_origin else None
    wide = case.to(torch.float64)
    truth = EQUATIONS(wide.base, wide.experts, WEIGHTS, means, origin, torch.float64)
    baseline = EQUATIONS(case.base, case.experts, WEIGHTS, means, origin)
    actual = function(case.base, case.experts, WEIGHTS, means, origin)
    assert_accurate("A", actual.A, baseline.A, truth.A)
    assert_accurate("B", actual.B, baseline.B, truth.B)


def test_normal_equations_vanish_at_their_origin() -> None:
    """B is exactly 0 where O is the only task vector: what makes displacements accurate in float32."""
    case = task_case((30, 40), [torch.bfloat16] * 2)
    origin = case.experts[0].float() - case.base.float()
    equations = native.normal_equations(case.base, case.experts, [1.0], origin=origin)
    assert_same("B", equations.B, torch.zeros(30, 40))


def test_thread_count_does_not_change_normal_equations() -> None:
    case = task_case((150, 260), [torch.bfloat16] * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = native.normal_equations(case.base, case.experts, WEIGHTS)
    torch.set_num_threads(2)
    two = native.normal_equations(case.base, case.experts, WEIGHTS)
    torch.set_num_threads(threads)
    assert_same("A", two.A, one.A)
    assert_same("B", two.B, one.B)
