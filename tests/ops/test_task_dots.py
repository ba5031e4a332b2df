"""task_dots: every axis, dtype and layout against float64, in C++ and Triton."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.shapes import AXES, BLOCK, Axis
from pymerge.errors import ArgumentError
from pymerge.ops._blocks import matrix_blocks
from pymerge.ops.task_dots import TaskDots
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from tests.helpers.arrays import assert_same_results, with_arrays
from tests.helpers.vectors import vectors

BACKENDS = ("reference", "native")
# Beside matrices: a number, a bias, a stack, a row that is longer than one chunk of the C++ form.
OTHER_SHAPES = ((), (70,), (3, 5, 8), (1, 40_000), (2, 33_000), (0,), (2, 0, 3))
TRITON = [device for backend, device in implementations("task_dots") if backend == "triton"]

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def expected_dots(base: Tensor | None, tensors: list[Tensor], axis: str) -> np.ndarray:
    """From deltas that are formed in float32, as the op says."""
    origin = 0.0 if base is None else base.float()
    stacked = np.array([vectors((tensor.float() - origin).cpu(), axis) for tensor in tensors])
    return np.einsum("sgn,tgn->gst", stacked, stacked)


def check_dots(backend: str, base: Tensor | None, tensors: list[Tensor], axis: Axis) -> None:
    run = Runner(backend, tensors[0].device.type)
    dots = run(TaskDots(base, tensors, axis))
    assert run.choices["task_dots"].backend == backend
    expected = expected_dots(base, tensors, axis)
    assert dots.dtype == np.float64
    assert dots.shape == expected.shape
    size = np.sqrt(np.einsum("gss->gs", expected))
    assert np.all(np.abs(dots - expected) <= 1e-13 * size[:, :, None] * size[:, None, :])
    np.testing.assert_array_equal(dots, dots.swapaxes(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices(backend: str, shape: tuple[int, int], layout: str) -> None:
    for dtype in FLOATS:
        case = task_case(shape, [torch.float32, dtype, torch.bfloat16, torch.float32], layout=layout)
        for axis in AXES:
            check_dots(backend, case.base, case.experts, axis)
            check_dots(backend, None, case.experts[:2], axis)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_shapes(backend: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *tensors = (torch.randn(shape, generator=generator) for _ in range(3))
    for axis in AXES:
        check_dots(backend, base, tensors, axis)
        check_dots(backend, None, tensors[:1], axis)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(300, 1111, generator=generator) for _ in range(3)]
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            found.append([Runner(backend)(TaskDots(None, tensors, axis)) for axis in AXES])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_not_rounded_and_large_values_do_not_overflow(backend: str) -> None:
    run = Runner(backend)
    one = torch.tensor([1.0 + 2.0**-40, 0.0], dtype=torch.float64)
    assert run(TaskDots(None, [one]))[0, 0, 0].item() == (1.0 + 2.0**-40) ** 2
    large = torch.full((40,), 3e38)
    assert run(TaskDots(None, [large]))[0, 0, 0].item() == pytest.approx(40 * float(large[0]) ** 2, rel=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend: str) -> None:
    first, second = torch.ones(3, 4), torch.ones(3, 4)
    first[1, 2] = float("nan")
    dots = Runner(backend)(TaskDots(None, [first, second], "rows"))
    assert np.isnan(dots).tolist() == [[[False] * 2] * 2, [[True, True], [True, False]], [[False] * 2] * 2]


@pytest.mark.parametrize("shape", [(7, 9), *OTHER_SHAPES])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [False, True])
def test_arrays_give_the_same_bits(shape: tuple[int, ...], axis: Axis, with_base: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (*FLOATS, torch.float64):
        base, *tensors = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        op, run = TaskDots(base if with_base else None, tensors, axis), Runner("native")
        assert_same_results(f"{axis} {dtype}", run(with_arrays(op)), run(op))


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 70), (30, 1), (23, 35)])
def test_triton_on_matrices(device: str, shape: tuple[int, int]) -> None:
    for index, dtype in enumerate(FLOATS):
        case = task_case(shape, [torch.float32, dtype, torch.bfloat16], device=device, layout=LAYOUTS[index])
        check_dots("triton", case.base, case.experts, AXES[index])
        check_dots("triton", None, case.experts, AXES[index - 1])


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("shape", [(), (70,), (3, 5, 8), (2, 0, 3)])
def test_triton_on_other_shapes(device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *tensors = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    for axis in AXES:
        check_dots("triton", base, tensors, axis)


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("axis", AXES[:2])
def test_triton_on_vectors_in_several_parts(device: str, axis: Axis) -> None:
    """Parts of 512 elements in the interpreter, the last one with a tail."""
    case = task_case((2, 1100), [torch.float32] * 3, device=device)
    check_dots("triton", case.base, case.experts, axis)


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("tasks", [8, 9, 17])
def test_triton_on_many_tensors(device: str, tasks: int) -> None:
    """One group of 8, one more than a group, and three groups."""
    case = task_case((1, 130), [torch.bfloat16] * (tasks + 1), device=device)
    check_dots("triton", case.base, case.experts, "whole")


@pytest.mark.parametrize("device", TRITON)
def test_triton_does_not_overflow_and_nan_stays_in_its_row(device: str) -> None:
    run, large = Runner("triton", device), torch.full((40,), 3e38, device=device)
    assert run(TaskDots(None, [large]))[0, 0, 0] == pytest.approx(40 * float(large[0]) ** 2, rel=1e-14)
    first, second = torch.ones(3, 4, device=device), torch.ones(3, 4, device=device)
    first[1, 2] = float("nan")
    dots = run(TaskDots(None, [first, second], "rows"))
    assert np.isnan(dots).tolist() == [[[False] * 2] * 2, [[True, True], [True, False]], [[False] * 2] * 2]


def test_errors_name_what_is_wrong() -> None:
    run, one = Runner(), torch.ones(2, 3)
    with pytest.raises(ArgumentError, match="axis 'row' is unknown; choose one of whole, rows, columns"):
        run(TaskDots(None, [one], "row"))
    with pytest.raises(ArgumentError, match="no tensors were given"):
        run(TaskDots(None, []))


def test_blocks_cover_a_matrix_once() -> None:
    seen = torch.zeros(5, 3 * BLOCK // 2)
    for place in matrix_blocks(*seen.shape, BLOCK):
        seen[place] += 1
    assert seen.unique().tolist() == [1.0]


def test_scratch_is_that_of_a_block_of_all_tensors() -> None:
    assert TaskDots.scratch((10, 3), 2, native=False) == 24 * 30 * 3
    assert TaskDots.scratch((2**12, 2**12), 2, native=False) == 24 * BLOCK * 3
    assert TaskDots.scratch((2**12, 2**12), 2, native=True) == 0
