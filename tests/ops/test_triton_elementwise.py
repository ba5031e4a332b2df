"""task_dots and combine_vectors in Triton: bit for bit the reference, or near it where sums differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import load
from pymerge.common.shapes import AXES, Axis, vector_shape
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

DEVICES = [device for backend, device in implementations("task_dots") if backend == "triton"]
# Beside matrices: a number, a bias, a stack, nothing.
OTHER_SHAPES = ((), (70,), (3, 5, 8), (2, 0, 3))
DOUBLE = torch.float64

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def triton(op: str) -> Callable[..., Tensor]:
    return load("triton").implementations()[op]


def check_dots(base: Tensor | None, tensors: list[Tensor], axis: Axis) -> None:
    found = triton("task_dots")(base, tensors, axis)
    expected = OPS["task_dots"].reference(base, tensors, axis)
    assert found.shape == expected.shape
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert bool(((found - expected).abs() <= 1e-13 * size[:, :, None] * size[:, None, :]).all())
    assert_same("symmetric", found, found.mT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 70), (30, 1), (23, 35)])
def test_dots_of_matrices(device: str, shape: tuple[int, int]) -> None:
    for index, dtype in enumerate(FLOATS):
        case = task_case(shape, [torch.float32, dtype, torch.bfloat16], device=device, layout=LAYOUTS[index])
        check_dots(case.base, case.experts, AXES[index])
        check_dots(None, case.experts, AXES[index - 1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_dots_of_other_shapes(device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *tensors = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    for axis in AXES:
        check_dots(base, tensors, axis)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", AXES[:2])
def test_dots_of_vectors_in_several_parts(device: str, axis: Axis) -> None:
    """Parts of 512 elements in the interpreter, the last one with a tail."""
    case = task_case((2, 1100), [torch.float32] * 3, device=device)
    check_dots(case.base, case.experts, axis)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tasks", [8, 9, 17])
def test_dots_of_many_tensors(device: str, tasks: int) -> None:
    """One group of 8, one more than a group, and three groups."""
    case = task_case((1, 130), [torch.bfloat16] * (tasks + 1), device=device)
    check_dots(case.base, case.experts, "whole")


@pytest.mark.parametrize("device", DEVICES)
def test_large_values_do_not_overflow_and_nan_stays_in_its_row(device: str) -> None:
    large = torch.full((40,), 3e38, device=device)
    found = triton("task_dots")(None, [large])[0, 0, 0].item()
    assert found == pytest.approx(40 * float(large[0]) ** 2, rel=1e-14)
    first, second = torch.ones(3, 4, device=device), torch.ones(3, 4, device=device)
    first[1, 2] = float("nan")
    dots = triton("task_dots")(None, [first, second], "rows")
    assert dots.isnan().tolist() == [[[False] * 2] * 2, [[True, True], [True, False]], [[False] * 2] * 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7, 9), (5,), (2, 3, 4), (), (0, 3), (3, 1300), (1300, 2)])
@pytest.mark.parametrize("with_base", [False, True])
def test_combine_vectors(device: str, shape: tuple[int, ...], with_base: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    base, *tensors = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    tensors = [tensor.to(dtype) for tensor, dtype in zip(tensors, FLOATS, strict=True)]
    origin = base.bfloat16() if with_base else None
    for axis, out_dtype in zip(AXES, (None, *FLOATS[:2]), strict=True):
        rows, columns = vector_shape(shape, axis)
        weights = torch.randn(columns if axis == "columns" else rows, 3, generator=generator, dtype=DOUBLE).to(device)
        found = triton("combine_vectors")(origin, tensors, weights, axis, out_dtype)
        reference = OPS["combine_vectors"].reference
        wide = None if origin is None else origin.double()
        truth = reference(wide, [tensor.double() for tensor in tensors], weights.float().double(), axis, DOUBLE)
        expected = reference(origin, tensors, weights, axis, out_dtype)
        assert found.shape == shape
        assert_accurate(f"{shape} {axis}", found, expected, truth)
