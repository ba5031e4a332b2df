"""sce_spread in C++, bit for bit the reference, and the reference against NumPy's variance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.ops.sce_spread import SceSpread
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("sce_spread")


def make(base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None) -> SceSpread:
    return SceSpread(base, experts)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_reference_is_the_variance_of_the_task_vectors(dtype: torch.dtype) -> None:
    case = task_case((40, 70), [dtype] * 4)
    taus = np.stack([(expert.double() - case.base.double()).numpy() for expert in case.experts])
    found = make(case.base, case.experts).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(found.double().numpy(), taus.var(0), rtol=rtol, atol=rtol * taus.var(0).max())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int]) -> None:
    elementwise.check_bits(backend, device, make, 3, shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    elementwise.check_threads(backend, make, 3)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
def test_not_a_number_is_where_the_reference_has_it(backend: str, device: str, value: float) -> None:
    elementwise.check_special(backend, device, make, 3, value)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays(backend: str) -> None:
    elementwise.check_arrays(backend, make, 3)
