"""singular_sum against the published form in float64, and the triplets and polar factors that it is made of."""

from __future__ import annotations

import math

import pytest
import torch

from pymerge.backends.native._products import single_times
from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops._singular import leading_triplets, numerical_triplets, orthogonalised
from pymerge.ops.singular_sum import SingularSum
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights, task_case
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import tsv_delta
from tests.helpers.rounding import assert_as_good_as_double

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    expected = tsv_delta(as_float64(base), [as_float64(expert) for expert in experts])
    found = SingularSum(base, experts).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(as_float64(found), expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    expected = SingularSum(base, experts).reference()
    found = SingularSum(lay_out(base, layout), [lay_out(expert, layout) for expert in experts]).reference()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_nothing_is_left_of_deltas_of_zero_and_of_no_elements() -> None:
    base = torch.ones(6, 4)
    assert not SingularSum(base, [base, base]).reference().any()
    for shape in ((0, 4), (4, 0), (1, 5)):
        empty = torch.ones(shape)
        assert_same("X", SingularSum(empty, [empty + 1, empty]).reference(), torch.zeros(shape))


def test_arrays_and_the_native_backend() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), SingularSum(base, experts)
    X = run(op)
    assert run.choices["singular_sum"].backend == "native"
    assert relative_error(as_float64(X), as_float64(op.reference())) < 1e-6
    assert_same("arrays", run(SingularSum(Array.of(base), [Array.of(e) for e in experts])), X)


@pytest.mark.parametrize("shape", [(1600, 800), (800, 1600), (800, 800)])
def test_large_layers_keep_the_digits_of_16_bits(shape: tuple[int, int]) -> None:
    case = task_case(shape, [torch.bfloat16] * 4)
    found = Runner("native")(SingularSum(case.base, case.experts))
    assert_as_good_as_double(case.base, found, SingularSum(case.base.double(), case.experts).reference())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"singular_sum: the base has shape \(4,\), expected 2 dimensions"):
        SingularSum(torch.zeros(4), [torch.zeros(4)]).check()


def test_triplets_of_badly_conditioned_matrices() -> None:
    """The Gram cannot resolve singular values below 1e-6 of the largest; an SVD does."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(12, 8, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -10, 8, dtype=torch.float64)
    M = U * s @ V.mT
    found_U, found_s, found_V = leading_triplets(M, 8)
    torch.testing.assert_close(found_s, s, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_U @ found_V.mT, U @ V.mT, rtol=0, atol=1e-5)
    assert len(numerical_triplets(M, 8)[1]) == int((s > 12 * torch.finfo(torch.float32).eps).sum())


def test_orthogonalised_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    factor = orthogonalised(U)
    torch.testing.assert_close(factor.mT @ factor, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    twice = orthogonalised(torch.cat([factor, factor], dim=1))
    torch.testing.assert_close(twice, torch.cat([factor, factor], dim=1) / math.sqrt(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_vectors_by_float32_are_measured(spread: float) -> None:
    """Those of singular values far below the others are rounding in float32, and are formed in float64 then."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, 64, generator=generator, dtype=torch.float64))[0] for rows in (300, 200)
    )
    s = torch.logspace(0, -math.log10(spread), 64, dtype=torch.float64)
    found = single_times((left * s) @ right.mT, right / s)
    assert float((found - left).norm()) <= 4e-6 * 8.0
