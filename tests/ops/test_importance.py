"""importance in C++, bit for bit the reference, and the reference against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.importance import Importance
from pymerge.ops.row_divergence import RowDivergence
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("importance")


def make(base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None) -> Importance:
    return Importance(base, experts[0], RowDivergence(base, experts[0]).reference())


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_reference_is_the_difference_times_the_divergence(dtype: torch.dtype) -> None:
    case = task_case((40, 70), [dtype, dtype])
    op = make(case.base, case.experts)
    delta = case.experts[0].double().numpy() - case.base.double().numpy()
    found = op.reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = np.abs(delta) * op.divergence[:, None]
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rtol, atol=rtol * expected.max())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int]) -> None:
    elementwise.check_bits(backend, device, make, 1, shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    elementwise.check_threads(backend, make, 1)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
def test_not_a_number_is_where_the_reference_has_it(backend: str, device: str, value: float) -> None:
    elementwise.check_special(backend, device, make, 1, value)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays(backend: str) -> None:
    elementwise.check_arrays(backend, make, 1)


def test_divergences_of_other_rows_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"importance: divergences of shape \(4,\) for rows of \(3, 4\)"):
        Importance(base, base, np.zeros(4)).check()
    with pytest.raises(ArgumentError, match=r"divergences of shape \(3, 1\) for rows of \(3, 4\)"):
        Importance(base, base, np.zeros((3, 1))).check()
