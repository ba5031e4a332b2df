"""arcee_fusion in C++, bit for bit the reference, and the reference against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.arcee_fusion import ArceeFusion
from pymerge.ops.importance import Importance
from pymerge.ops.row_divergence import RowDivergence
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_same
from tests.helpers import elementwise

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("arcee_fusion")
LEAST = 1e-7


def make(
    base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None, out: Tensor | None = None
) -> ArceeFusion:
    return ArceeFusion(base, experts[0], RowDivergence(base, experts[0]).reference(), LEAST, out_dtype, out)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_reference_takes_what_is_important(dtype: torch.dtype) -> None:
    case = task_case((40, 70), [dtype, dtype])
    divergence = RowDivergence(case.base, case.experts[0]).reference()
    scores = Importance(case.base, case.experts[0], divergence).reference()
    least = float(scores.double().quantile(0.6))
    found = ArceeFusion(case.base, case.experts[0], divergence, least).reference()
    assert_same("merged", found, torch.where(scores.double() >= least, case.experts[0], case.base))
    assert 0.3 < float((scores.double() >= least).double().mean()) < 0.5


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


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_memory_for_the_result(backend: str, device: str) -> None:
    elementwise.check_out(backend, device, lambda base, experts, out: make(base, experts, None, out), 1)


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"arcee_fusion: divergences of shape \(4,\) for rows of \(3, 4\)"):
        ArceeFusion(base, base, np.zeros(4), LEAST).check()
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int64 is not floating point"):
        ArceeFusion(base, base, np.zeros(3), LEAST, torch.int64).check()
