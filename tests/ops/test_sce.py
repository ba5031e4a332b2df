"""sce in C++, bit for bit the reference, and the reference against its formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.sce import Sce
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("sce")
WEIGHTS = (0.2, 0.3, 0.5)
# Share of the elements that is selected (None: no mask), and the least divisor.
SETTINGS = ((None, 0.0), (0.3, 0.3))


def make(share: float | None, least: float) -> elementwise.Make:
    def made(base: Any, experts: list[Any], out_dtype: torch.dtype | None) -> Sce:
        return Sce(base, experts, WEIGHTS, mask(base, share), least, out_dtype)

    return made


def mask(base: Any, share: float | None) -> Any:
    """A mask of the base's kind."""
    if share is None:
        return None
    if isinstance(base, Array):
        return Array.of(elementwise.select_bits(base.numel, share))
    return elementwise.select_bits(base.numel(), share, base.device)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize(("share", "least"), SETTINGS)
def test_reference_is_the_mean_over_the_sign_of_the_majority(
    dtype: torch.dtype, share: float | None, least: float
) -> None:
    case = task_case((40, 70), [dtype] * 4)
    base, *experts = (tensor.double().numpy() for tensor in (case.base, *case.experts))
    taus = np.stack([expert - base for expert in experts])
    if share is not None:
        numbers = torch.rand(base.size, generator=torch.Generator().manual_seed(0))
        taus = taus * (numbers < share).numpy().reshape(base.shape)
    kept = np.where(taus.sum(0) >= 0, taus > 0, taus < 0) * np.reshape(WEIGHTS, (3, 1, 1))
    divisor = np.maximum(kept.sum(0), least)
    expected = base + (kept * taus).sum(0) / np.where(divisor == 0, 1, divisor)
    found = make(share, least)(case.base, case.experts, torch.float64).reference()
    assert np.abs(found.numpy() - expected).max() < (1e-15 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
@pytest.mark.parametrize(("share", "least"), SETTINGS)
def test_bit_for_bit(backend: str, device: str, shape: tuple[int, int], share: float | None, least: float) -> None:
    elementwise.check_bits(backend, device, make(share, least), 3, shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("share", "least"), SETTINGS)
def test_same_bits_for_any_number_of_threads(backend: str, share: float | None, least: float) -> None:
    elementwise.check_threads(backend, make(share, least), 3)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
@pytest.mark.parametrize(("share", "least"), SETTINGS)
def test_not_a_number_is_where_the_reference_has_it(
    backend: str, device: str, value: float, share: float | None, least: float
) -> None:
    elementwise.check_special(backend, device, make(share, least), 3, value)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("share", "least"), SETTINGS)
def test_arrays(backend: str, share: float | None, least: float) -> None:
    elementwise.check_arrays(backend, make(share, least), 3)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_memory_for_the_result(backend: str, device: str) -> None:
    def made(base: Tensor, experts: list[Tensor], out: Tensor) -> Sce:
        return Sce(base, experts, WEIGHTS, mask(base, 0.3), 0.3, None, out)

    elementwise.check_out(backend, device, made, 3)


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="sce: 1 weights for 2 experts"):
        Sce(base, [base, base], [1.0]).check()
    with pytest.raises(ArgumentError, match=r"sce: the masks are torch\.uint8 of shape \(1, 16\)"):
        Sce(base, [base], [1.0], torch.zeros(1, 16, dtype=torch.uint8)).check()
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int64 is not floating point"):
        Sce(base, [base], [1.0], out_dtype=torch.int64).check()
