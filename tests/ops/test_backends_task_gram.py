"""task_gram and normal_equations on every compiled backend, against float64 and the reference's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends import native
from pymerge.backends.runner import load
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
    function = load(backend).implementations()["task_gram"]
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
    actual = function(base, [expert], [1.0])
    assert_accurate("S", actual, GRAM(base, [expert], [1.0]), truth)
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
    function = load(backend).implementations()["task_gram"]
    base, expert = torch.zeros(5, 9, dtype=dtype, device=device), torch.ones(5, 9, dtype=dtype, device=device)
    base[0, 0], expert[0, 0] = -60000.0, 60000.0
    base[3, 8] = 0.0123  # a delta of two parts beside the infinite ones
    expert[1, 2], base[1, 3] = float("inf"), float("inf")
    expert[2, 4] = float("nan")
    expert[:, 6], expert[:, 7] = 6e-8, torch.finfo(dtype).smallest_normal
    truth = GRAM(base.double(), [expert.double()], [1.0])
    actual = function(base, [expert], [1.0])
    assert_accurate("S", actual, GRAM(base, [expert], [1.0]), truth)
    assert actual[0, 0].isfinite()
    tiny = actual[6, 6].item() / truth[6, 6].item()
    assert abs(tiny - 1.0) < 1e-6


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
