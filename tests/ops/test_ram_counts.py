"""ram_counts on every backend: the counts of the reference, and those of its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.ops.ram_counts import RamCounts
from pymerge.testing.cases import SHAPES, implementations, task_case
from tests.helpers import elementwise

RUNS = implementations("ram_counts")
EPSILON = 3e-4

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NaN and infinities pass through NumPy in Triton's interpreter.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]


def make(base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None) -> RamCounts:
    return RamCounts(base, experts, EPSILON)


def test_reference_counts_lone_and_shared_elements() -> None:
    case = task_case((40, 70), [torch.float64] * 4)
    active = np.stack([(expert - case.base).abs().numpy() > EPSILON for expert in case.experts])
    count = active.sum(0)
    expected = [[(each & (count == 1)).sum(), (each & (count > 1)).sum()] for each in active]
    found = make(case.base, case.experts).reference()
    assert found.dtype == np.int64
    assert found.tolist() == expected
    assert found.min() > 0


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int]) -> None:
    elementwise.check_bits(backend, device, make, 3, shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_same_counts_for_any_number_of_threads(backend: str) -> None:
    elementwise.check_threads(backend, make, 3)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
def test_not_a_number_counts_as_in_the_reference(backend: str, device: str, value: float) -> None:
    elementwise.check_special(backend, device, make, 3, value, shows=False)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays(backend: str) -> None:
    elementwise.check_arrays(backend, make, 3)
