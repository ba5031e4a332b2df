"""ram on every backend, bit for bit the reference, and the reference against its formula in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pymerge.errors import ArgumentError
from pymerge.ops.ram import Ram
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise

RUNS = implementations("ram")
EPSILON = 3e-4
FACTORS = (None, (1.0, 1.3, 0.7))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NaN and infinities pass through NumPy in Triton's interpreter.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]


def make(factors: Sequence[float] | None) -> elementwise.Make:
    return lambda base, experts, out_dtype: Ram(base, experts, EPSILON, factors, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("factors", FACTORS)
def test_reference_is_the_mean_of_what_is_active(dtype: torch.dtype, factors: Sequence[float] | None) -> None:
    case = task_case((40, 70), [dtype] * 4)
    base, *experts = (tensor.double().numpy() for tensor in (case.base, *case.experts))
    taus = np.stack([expert - base for expert in experts])
    active = np.abs(taus) > np.float32(EPSILON) if dtype != torch.float64 else np.abs(taus) > EPSILON
    count = active.sum(0)
    sizes = np.where(count == 1, np.reshape(factors or [1.0] * 3, (3, 1, 1)), 1.0)
    expected = base + (sizes * np.where(active, taus, 0.0)).sum(0) / np.maximum(count, 1)
    found = make(factors)(case.base, case.experts, torch.float64).reference()
    assert np.abs(found.numpy() - expected).max() < (1e-15 if dtype == torch.float64 else 1e-7)
    assert {0, 1, 3} <= set(np.unique(count).tolist())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
@pytest.mark.parametrize("factors", FACTORS)
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int], factors: Sequence[float] | None) -> None:
    elementwise.check_bits(backend, device, make(factors), 3, shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("factors", FACTORS)
def test_same_bits_for_any_number_of_threads(backend: str, factors: Sequence[float] | None) -> None:
    elementwise.check_threads(backend, make(factors), 3)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
@pytest.mark.parametrize("factors", FACTORS)
def test_not_a_number_is_where_the_reference_has_it(
    backend: str, device: str, value: float, factors: Sequence[float] | None
) -> None:
    elementwise.check_special(backend, device, make(factors), 3, value)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays(backend: str) -> None:
    elementwise.check_arrays(backend, make(FACTORS[1]), 3)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_memory_for_the_result(backend: str, device: str) -> None:
    elementwise.check_out(
        backend, device, lambda base, experts, out: Ram(base, experts, EPSILON, FACTORS[1], None, out), 3
    )


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="ram: 1 factors for 2 experts"):
        Ram(base, [base, base], EPSILON, [1.0]).check()
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int64 is not floating point"):
        Ram(base, [base], EPSILON, None, torch.int64).check()
    with pytest.raises(ArgumentError, match="ram: no experts were given"):
        Ram(base, [], EPSILON).check()
