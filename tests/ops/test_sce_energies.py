"""sce_energies in C++ against the reference, and the reference against sums of squares in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.sce_energies import SceEnergies
from pymerge.testing.cases import FLOATS, SHAPES, implementations, task_case
from tests.helpers import elementwise
from tests.helpers.elementwise import close_sums

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = implementations("sce_energies")
SHARES = (None, 0.3)  # of the elements that count; None: no mask


def make(share: float | None) -> elementwise.Make:
    def made(base: Any, experts: list[Any], out_dtype: torch.dtype | None) -> SceEnergies:
        if share is None:
            return SceEnergies(base, experts)
        if isinstance(base, Array):
            return SceEnergies(base, experts, Array.of(elementwise.select_bits(base.numel, share)))
        return SceEnergies(base, experts, elementwise.select_bits(base.numel(), share, base.device))

    return made


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("share", SHARES)
def test_reference_is_the_sum_of_squares(dtype: torch.dtype, share: float | None) -> None:
    case = task_case((40, 70), [dtype] * 4)
    numbers = torch.rand(case.base.numel(), generator=torch.Generator().manual_seed(0)).view(case.base.shape)
    counted = numbers < (1.1 if share is None else share)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taus = [(expert.to(wide) - case.base.to(wide)).double() * counted for expert in case.experts]
    found = make(share)(case.base, case.experts, None).reference()
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([float(tau.square().sum()) for tau in taus], rel=1e-13)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
@pytest.mark.parametrize("share", SHARES)
def test_agrees_with_the_reference(backend: str, device: str, shape: tuple[int, int], share: float | None) -> None:
    def close(label: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)

    elementwise.check_bits(backend, device, make(share), 3, shape, close)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("share", SHARES)
def test_same_bits_for_any_number_of_threads(backend: str, share: float | None) -> None:
    elementwise.check_threads(backend, make(share), 3)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("value", elementwise.SPECIAL)
@pytest.mark.parametrize("share", SHARES)
def test_not_a_number_is_where_the_reference_has_it(
    backend: str, device: str, value: float, share: float | None
) -> None:
    elementwise.check_special(backend, device, make(share), 3, value, close_sums)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("share", SHARES)
def test_arrays(backend: str, share: float | None) -> None:
    elementwise.check_arrays(backend, make(share), 3)


def test_a_mask_that_does_not_fit_is_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"sce_energies: the masks are torch\.uint8 of shape \(2, 8\)"):
        SceEnergies(base, [base], torch.zeros(2, 8, dtype=torch.uint8)).check()
