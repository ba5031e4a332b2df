"""nearswap and ram in Triton: bit for bit the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import load
from pymerge.common.shapes import AXES, Axis, vector_shape
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

DEVICES = [device for backend, device in implementations("task_dots") if backend == "triton"]
# Beside matrices: a number, a bias, a stack, nothing.
OTHER_SHAPES = ((), (70,), (3, 5, 8), (2, 0, 3))
DOUBLE = torch.float64

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def triton(op: str) -> Callable[..., Tensor]:
    return load("triton").implementations()[op]


CALLS: list[tuple[str, int, dict[str, Any]]] = [
    ("nearswap", 1, {"t": 3e-4}),
    ("ram", 3, {"epsilon": 3e-4}),
    ("ram", 3, {"epsilon": 3e-4, "factors": [1.0, 1.3, 0.7]}),
    ("ram_counts", 3, {"epsilon": 3e-4}),
]


def call(function: Any, op: str, base: Tensor, experts: list[Tensor], settings: dict[str, Any]) -> Tensor:
    result: Tensor = function(base, experts[0] if op == "nearswap" else experts, **settings)
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "count", "settings"), CALLS)
def test_bit_for_bit(device: str, op: str, count: int, settings: dict[str, Any], shape: tuple[int, int]) -> None:
    for index, (first, second) in enumerate(itertools.product(FLOATS, FLOATS[:2])):
        dtypes = [first, *[second] * (count - 1), torch.bfloat16]
        case = task_case(shape, dtypes, device=device, layout=LAYOUTS[index % 4])
        case.experts[0].copy_(torch.where(case.experts[0] > 0.02, case.base, case.experts[0]))  # some are untouched
        options = settings if op == "ram_counts" else {**settings, "out_dtype": (None, *FLOATS)[index % 4]}
        found = call(triton(op), op, case.base, case.experts, options)
        assert_same(f"{first} {second}", found, call(OPS[op].reference, op, case.base, case.experts, options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "count", "settings"), CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_where_the_reference_has_it(
    device: str, op: str, count: int, settings: dict[str, Any], value: float
) -> None:
    case = task_case((3, 70), [torch.float32] * (count + 1), device=device)
    case.experts[0][1, 60], case.base[2, 2] = value, value
    found = call(triton(op), op, case.base, case.experts, settings)
    assert_same(op, found, call(OPS[op].reference, op, case.base, case.experts, settings))
    if op != "ram_counts":
        assert not bool(found.isfinite().all())
