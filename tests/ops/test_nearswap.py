"""nearswap on every backend, bit for bit the reference, and the reference against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK
from pymerge.errors import ArgumentError
from pymerge.ops.nearswap import Nearswap
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise

RUNS = implementations("nearswap")
T = 3e-4

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NaN and infinities pass through NumPy in Triton's interpreter.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]


def make(base: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None) -> Nearswap:
    return Nearswap(base, experts[0], T, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_reference_moves_each_element_by_t_at_most(dtype: torch.dtype) -> None:
    case = task_case((40, 70), [dtype, torch.float32])
    base, expert = (tensor.double().numpy() for tensor in (case.base, case.experts[0]))
    share = np.minimum(T / np.maximum(np.abs(expert - base), 1e-6), 1.0)
    expected = share * expert + (1.0 - share) * base
    found = make(case.base, case.experts, torch.float64).reference()
    error = 1e-15 if dtype == torch.float64 else 1e-7
    assert np.abs(found.numpy() - expected).max() < error
    assert np.abs(expected - base).max() < T * (1 + 1e-12)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int]) -> None:
    elementwise.check_bits(backend, device, make, 1, shape)


def test_several_blocks_of_the_reference() -> None:
    elementwise.check_bits("native", "cpu", make, 1, (2, BLOCK + 7))


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
    elementwise.check_out(backend, device, lambda base, experts, out: Nearswap(base, experts[0], T, None, out), 1)


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    for t in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match=r"nearswap: t is .*; it must be at least 0"):
            Nearswap(base, base, t).check()
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int64 is not floating point"):
        Nearswap(base, base, 1.0, torch.int64).check()
    with pytest.raises(ArgumentError, match=r"expert 0 has shape \(3,\), the base \(3, 4\)"):
        Nearswap(base, base[:, 0], 1.0).check()
    with pytest.raises(ArgumentError, match="out is in the memory of an input"):
        Nearswap(base, base + 1, 1.0, out=base).check()
