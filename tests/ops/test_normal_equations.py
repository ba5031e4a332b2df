"""normal_equations on every compiled backend, against float64 and the reference's error; ridges and origins."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = (0.7, 0.0, 2.5)
RUNS = implementations("normal_equations")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_equations(
    backend: str, device: str, dtype: torch.dtype, centred: bool, with_origin: bool, shape: tuple[int, int]
) -> None:
    run = Runner(backend, device)
    case = task_case(shape, [dtype] * 4, device=device)
    means = TaskStats(case.base, case.experts).reference().means if centred else None
    origin = case.experts[2].float() - case.base.float() if with_origin else None
    wide = case.to(torch.float64)
    truth = NormalEquations(wide.base, wide.experts, WEIGHTS, means, origin, "F64").reference()
    op = NormalEquations(case.base, case.experts, WEIGHTS, means, origin)
    baseline, actual = op.reference(), run(op)
    assert_accurate("A", actual.A, baseline.A, truth.A)
    assert_accurate("B", actual.B, baseline.B, truth.B)


def test_normal_equations_vanish_at_their_origin() -> None:
    """B is exactly 0 where O is the only task vector: what makes displacements accurate in float32."""
    case = task_case((30, 40), [torch.bfloat16] * 2)
    origin = case.experts[0].float() - case.base.float()
    equations = Runner("native")(NormalEquations(case.base, case.experts, [1.0], origin=origin))
    assert_same("B", equations.B, torch.zeros(30, 40))


def test_thread_count_does_not_change_normal_equations() -> None:
    case = task_case((150, 260), [torch.bfloat16] * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = Runner("native")(NormalEquations(case.base, case.experts, WEIGHTS))
    torch.set_num_threads(2)
    two = Runner("native")(NormalEquations(case.base, case.experts, WEIGHTS))
    torch.set_num_threads(threads)
    assert_same("A", two.A, one.A)
    assert_same("B", two.B, one.B)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_normal_equations_with_ridges(shape: tuple[int, int], backend: str, device: str) -> None:
    case = task_case(shape, [torch.float32] * 4, device=device).to(torch.float64)
    weights, ridges = [0.5, 0.0, 2.0], [1e-3, 2e-3, 0.0]
    taus = [expert - case.base for expert in case.experts]
    eye = torch.eye(shape[1], dtype=torch.float64, device=device)
    systems = [w * tau.mT @ tau + e * eye for w, e, tau in zip(weights, ridges, taus, strict=True)]
    found = Runner(backend, device)(NormalEquations(case.base, case.experts, weights, ridges=ridges))
    expected = sum(tau @ system for tau, system in zip(taus, systems, strict=True))
    assert torch.allclose(found.A, sum(systems), rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.B, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: str, layout: str) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    packed, case = (task_case((63, 65), dtypes, device=device, layout=each) for each in ("contiguous", layout))
    run = Runner(backend, device)
    found = run(NormalEquations(case.base, case.experts, WEIGHTS))
    expected = run(NormalEquations(packed.base, packed.experts, WEIGHTS))
    assert_same("A", found.A, expected.A)
    assert_same("B", found.B, expected.B)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays_give_the_bits_of_tensors(backend: str) -> None:
    case = task_case((7, 33), [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16])
    run = Runner(backend)
    expected = run(NormalEquations(case.base, case.experts, WEIGHTS))
    found = run(NormalEquations(Array.of(case.base), [Array.of(expert) for expert in case.experts], WEIGHTS))
    assert_same("A", found.A, expected.A)
    assert_same("B", found.B, expected.B)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_not_a_number_is_in_one_row_and_column_of_A_and_all_of_B(backend: str, device: str) -> None:
    case = task_case((20, 70), [torch.float32] * 2, device=device)
    case.experts[0][3, 66] = float("nan")
    A, B = Runner(backend, device)(NormalEquations(case.base, case.experts, [1.0]))
    expected = torch.zeros(70, 70, dtype=torch.bool, device=device)
    expected[66, :] = expected[:, 66] = True
    assert_same("A", A.isnan(), expected)
    assert bool(B.isnan().all())


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="normal_equations: 2 ridges for 1 experts"):
        NormalEquations(base, [base], [1.0], ridges=[1.0, 2.0]).check()
    with pytest.raises(ArgumentError, match=r"normal_equations: origin has shape \(4, 3\), expected \(3, 4\)"):
        NormalEquations(base, [base], [1.0], origin=base.mT).check()
    with pytest.raises(ArgumentError, match="normal_equations: dtype F16 is not float32 or float64"):
        NormalEquations(base, [base], [1.0], dtype="F16").check()
