"""isotropic (Iso-C, Iso-CTS) against the published form in float64."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.isotropic import Isotropic
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights, task_case
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import iso_delta
from tests.helpers.rounding import assert_as_good_as_double

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("common", [1.0, 0.5])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, common: float) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    expected = iso_delta(as_float64(base), [as_float64(expert) for expert in experts], common)
    found = Isotropic(base, experts, common).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(as_float64(found), expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    expected = Isotropic(base, experts, 0.5).reference()
    found = Isotropic(lay_out(base, layout), [lay_out(expert, layout) for expert in experts], 0.5).reference()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_nothing_is_left_of_deltas_of_zero_and_of_no_elements() -> None:
    base = torch.ones(6, 4)
    assert not Isotropic(base, [base, base]).reference().any()
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", Isotropic(empty, [empty + 1, empty]).reference(), torch.zeros(shape))


@pytest.mark.parametrize("common", [1.0, 0.5])
def test_arrays_and_the_native_backend(common: float) -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), Isotropic(base, experts, common)
    X = run(op)
    assert run.choices["isotropic"].backend == "native"
    assert relative_error(as_float64(X), as_float64(op.reference())) < 1e-6
    assert_same("arrays", run(Isotropic(Array.of(base), [Array.of(e) for e in experts], common)), X)


@pytest.mark.parametrize("over_rank", [False, True])
@pytest.mark.parametrize("shape", [(1600, 800), (800, 1600), (800, 800)])
def test_large_layers_keep_the_digits_of_16_bits(shape: tuple[int, int], over_rank: bool) -> None:
    case = task_case(shape, [torch.bfloat16] * 4)
    found = Runner("native")(Isotropic(case.base, case.experts, 1.0, over_rank))
    exact = Isotropic(case.base.double(), case.experts, 1.0, over_rank).reference()
    assert_as_good_as_double(case.base, found, exact)


def test_large_layers_of_low_rank_are_as_the_reference_has_them() -> None:
    base, experts = make_weights(1600, 800, 2, rank=3, dtype=torch.float64)
    base, experts = base.float(), [expert.float() for expert in experts]
    for over_rank in (False, True):
        op = Isotropic(base, experts, 1.0, over_rank)
        assert relative_error(as_float64(Runner("native")(op)), as_float64(op.reference())) < 1e-6


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"isotropic: the base has shape \(4,\), expected 2 dimensions"):
        Isotropic(torch.zeros(4), [torch.zeros(4)]).check()
    for common in (-0.1, 1.5):
        with pytest.raises(ArgumentError, match=r"isotropic: common is .*; give a share from 0 to 1"):
            Isotropic(torch.zeros(3, 4), [torch.zeros(3, 4)], common).check()
