"""task_dots and combine_vectors: every axis, dtype and layout against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.shapes import AXES
from pymerge.errors import ArgumentError
from pymerge.ops import task_dots
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, task_case
from pymerge.testing.compare import assert_same

BACKENDS = ("reference", "native")
# Beside matrices: a number, a bias, a stack, a row that is longer than one chunk of the C++ form.
OTHER_SHAPES = ((), (70,), (3, 5, 8), (1, 40_000), (2, 33_000), (0,), (2, 0, 3))


def vectors(tensor: Tensor, axis: str) -> np.ndarray:
    """[G, n] float64."""
    array = tensor.double().numpy()
    if axis == "whole":
        return array.reshape(1, array.size)
    if array.ndim == 0:
        return array.reshape(1, 1)
    if axis == "rows":
        return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
    return array.reshape(array.shape[0], int(np.prod(array.shape[1:]))).T


def expected_dots(base: Tensor | None, tensors: list[Tensor], axis: str) -> np.ndarray:
    """From deltas that are formed in float32, as the op says."""
    origin = 0.0 if base is None else base.float()
    stacked = np.array([vectors(tensor.float() - origin, axis) for tensor in tensors])
    return np.einsum("sgn,tgn->gst", stacked, stacked)


def check_dots(backend: str, base: Tensor | None, tensors: list[Tensor], axis: str) -> None:
    dots = Runner(backend)("task_dots", base, tensors, axis)
    expected = expected_dots(base, tensors, axis)
    assert dots.dtype == torch.float64
    assert dots.shape == expected.shape
    size = np.sqrt(np.einsum("gss->gs", expected))
    assert np.all(np.abs(dots.numpy() - expected) <= 1e-13 * size[:, :, None] * size[:, None, :])
    assert_same("symmetric", dots, dots.mT)


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
            found.append([Runner(backend)("task_dots", None, tensors, axis) for axis in AXES])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        for axis, left, right in zip(AXES, found[0], other, strict=True):
            assert_same(axis, left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_not_rounded_and_large_values_do_not_overflow(backend: str) -> None:
    run = Runner(backend)
    one = torch.tensor([1.0 + 2.0**-40, 0.0], dtype=torch.float64)
    assert run("task_dots", None, [one])[0, 0, 0].item() == (1.0 + 2.0**-40) ** 2
    large = torch.full((40,), 3e38)
    assert run("task_dots", None, [large])[0, 0, 0].item() == pytest.approx(40 * float(large[0]) ** 2, rel=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend: str) -> None:
    first, second = torch.ones(3, 4), torch.ones(3, 4)
    first[1, 2] = float("nan")
    dots = Runner(backend)("task_dots", None, [first, second], "rows")
    assert dots.isnan().tolist() == [[[False] * 2] * 2, [[True, True], [True, False]], [[False] * 2] * 2]


@pytest.mark.parametrize("shape", [(7, 9), (5,), (2, 3, 4), (), (0, 3)])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [False, True])
def test_combine_vectors(shape: tuple[int, ...], axis: str, with_base: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    base, *tensors = (torch.randn(shape, generator=generator) for _ in range(3))
    count = len(vectors(base, axis))
    weights = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    origin = base if with_base else None
    merged = Runner()("combine_vectors", origin, tensors, weights, axis, torch.float64)
    start = vectors(base, axis) if with_base else np.zeros_like(vectors(base, axis))
    expected = start + sum(
        weights[:, t, None].numpy() * (vectors(tensor, axis) - start) for t, tensor in enumerate(tensors)
    )
    assert merged.shape == shape
    np.testing.assert_allclose(vectors(merged, axis), expected, rtol=0, atol=2e-6)


def test_errors_name_what_is_wrong() -> None:
    run, one = Runner(), torch.ones(2, 3)
    with pytest.raises(ArgumentError, match="axis 'row' is unknown; choose one of whole, rows, columns"):
        run("task_dots", None, [one], "row")
    with pytest.raises(ArgumentError, match="no tensors were given"):
        run("task_dots", None, [])
    with pytest.raises(ArgumentError, match=r"weights have shape \(3, 1\), expected \(2, 1\)"):
        run("combine_vectors", None, [one], torch.ones(3, 1), "rows")


def test_blocks_cover_a_matrix_once() -> None:
    seen = torch.zeros(5, 3 * task_dots.BLOCK // 2)
    for place in task_dots.blocks(*seen.shape):
        seen[place] += 1
    assert seen.unique().tolist() == [1.0]
