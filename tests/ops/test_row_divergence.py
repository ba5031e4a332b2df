"""row_divergence in C++ against the reference, and the reference against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.ops.row_divergence import RowDivergence
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise
from tests.helpers.elementwise import close_sums

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("row_divergence")


def make(base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None) -> RowDivergence:
    return RowDivergence(base, experts[0])


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_reference_is_the_divergence_of_the_softmax_of_rows(dtype: torch.dtype) -> None:
    case = task_case((40, 70), [dtype, dtype])

    def probabilities(tensor: Tensor) -> np.ndarray:
        powers = np.exp(tensor.double().numpy())
        shares: np.ndarray = powers / powers.sum(-1, keepdims=True) + 1e-8
        return shares

    p, q = probabilities(case.experts[0]), probabilities(case.base)
    found = make(case.base, case.experts).reference()
    assert found.dtype == np.float64
    assert found.shape == (40,)
    np.testing.assert_allclose(found, np.maximum((p * np.log(p / q)).sum(-1), 0.0), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
def test_agrees_with_the_reference(backend: str, device: str, shape: tuple[int, int]) -> None:
    elementwise.check_bits(backend, device, make, 1, shape, close_sums)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rows_are_along_the_last_axis(backend: str) -> None:
    case = task_case((12, 7), [torch.float32] * 2)
    base, expert = case.base, case.experts[0]
    run = Runner(backend)
    rows = run(RowDivergence(base, expert))
    assert run(RowDivergence(base.view(3, 4, 7), expert.view(3, 4, 7))).tolist() == rows.tolist()
    assert run(RowDivergence(base[2], expert[2])).tolist() == rows[2:3].tolist()
    assert run(RowDivergence(base[0, 0], expert[0, 0])).tolist() == [0.0]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    elementwise.check_threads(backend, make, 1)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
def test_not_a_number_is_where_the_reference_has_it(backend: str, device: str, value: float) -> None:
    """(A probability of 0 is finite.)"""
    elementwise.check_special(backend, device, make, 1, value, close_sums, shows=False)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays(backend: str) -> None:
    elementwise.check_arrays(backend, make, 1)
