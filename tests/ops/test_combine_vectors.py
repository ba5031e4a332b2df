"""combine_vectors: sums with weights for each row or column against float64, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.common.shapes import AXES, Axis, vector_shape
from pymerge.errors import ArgumentError
from pymerge.ops.combine_vectors import CombineVectors
from pymerge.testing.cases import FLOATS, LAYOUTS, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.vectors import vectors

RUNS = implementations("combine_vectors")
DOUBLE = torch.float64


@pytest.mark.parametrize("shape", [(7, 9), (5,), (2, 3, 4), (), (0, 3)])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [False, True])
def test_the_reference_is_the_formula(shape: tuple[int, ...], axis: Axis, with_base: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    base, *tensors = (torch.randn(shape, generator=generator) for _ in range(3))
    weights = torch.randn(len(vectors(base, axis)), 2, generator=generator, dtype=DOUBLE).numpy()
    op = CombineVectors(base if with_base else None, tensors, weights, axis, DOUBLE)
    merged = op.reference()
    start = vectors(base, axis) if with_base else np.zeros_like(vectors(base, axis))
    expected = start + sum(weights[:, t, None] * (vectors(tensor, axis) - start) for t, tensor in enumerate(tensors))
    assert merged.shape == shape
    np.testing.assert_allclose(vectors(merged, axis), expected, rtol=0, atol=2e-6)
    assert_same("of arrays", with_arrays(op).reference(), merged)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [(7, 9), (5,), (2, 3, 4), (), (0, 3), (3, 1300), (1300, 2)])
@pytest.mark.parametrize("with_base", [False, True])
def test_backends(backend: str, device: str, shape: tuple[int, ...], with_base: bool) -> None:
    generator, run = torch.Generator().manual_seed(3), Runner(backend, device)
    base, *tensors = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    tensors = [tensor.to(dtype) for tensor, dtype in zip(tensors, FLOATS, strict=True)]
    origin = base.bfloat16() if with_base else None
    for axis, out_dtype in zip(AXES, (None, *FLOATS[:2]), strict=True):
        rows, columns = vector_shape(shape, axis)
        weights = torch.randn(columns if axis == "columns" else rows, 3, generator=generator, dtype=DOUBLE)
        op = CombineVectors(origin, tensors, weights.numpy(), axis, out_dtype)
        found, rounded = run(op), weights.float().double().numpy()
        assert run.choices[op.name].backend == backend
        wide = None if origin is None else origin.double()
        truth = CombineVectors(wide, [tensor.double() for tensor in tensors], rounded, axis, DOUBLE).reference()
        assert found.shape == shape
        assert_accurate(f"{shape} {axis}", found, op.reference(), truth)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: str, layout: str) -> None:
    run, weights = Runner(backend, device), np.linspace(-1.0, 2.0, 26).reshape(13, 2)
    case = task_case((13, 13), [torch.float32, torch.bfloat16, torch.float16], device=device, layout=layout)
    packed = [expert.contiguous() for expert in case.experts]
    for axis in AXES[1:]:
        found = run(CombineVectors(case.base, case.experts, weights, axis))
        assert_same(layout, found, run(CombineVectors(case.base.contiguous(), packed, weights, axis)))


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_a_result_is_written_where_it_is_wanted(backend: str, device: str) -> None:
    case = task_case((13, 77), [torch.bfloat16] * 3, device=device)
    run, out, weights = Runner(backend, device), torch.full((13, 77), float("nan"), device=device), np.ones((77, 2))
    assert run(CombineVectors(case.base, case.experts, weights, "columns", "F32", out)) is out
    assert_same("out", out, run(CombineVectors(case.base, case.experts, weights, "columns", "F32")))
    if backend in ("reference", "native"):
        room = Array.mapped(out.nbytes).at(0, "F32", (13, 77))
        run(with_arrays(CombineVectors(case.base, case.experts, weights, "columns", "F32", room)))
        assert_same("array", room.tensor(), out)


@pytest.mark.parametrize("shape", [(300, 1111), (2111, 70), (1, 70_000), (0, 3), (3, 0), ()], ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_float64_arrays_and_threads_in_cpp(shape: tuple[int, ...], axis: Axis) -> None:
    generator = torch.Generator().manual_seed(5)
    base, *tensors = (torch.randn(shape, generator=generator, dtype=DOUBLE) for _ in range(3))
    tensors[1] = tensors[1].bfloat16()
    rows, columns = vector_shape(shape, axis)
    weights = torch.randn(columns if axis == "columns" else rows, 2, generator=generator, dtype=DOUBLE).numpy()
    for origin in (base, None):
        op = CombineVectors(origin, tensors, weights, axis, DOUBLE)
        found = in_cpp(op, 1)
        torch.testing.assert_close(found, op.reference(), rtol=0, atol=1e-14)
        for threads in (1, 2, 5):
            assert_same_results(f"{threads}", in_cpp(with_arrays(op), threads), found)


def test_errors_name_what_is_wrong() -> None:
    run, one = Runner(), torch.ones(2, 3)
    with pytest.raises(ArgumentError, match=r"weights have shape \(3, 1\), expected \(2, 1\)"):
        run(CombineVectors(None, [one], np.ones((3, 1)), "rows"))
    with pytest.raises(ArgumentError, match="axis 'row' is unknown; choose one of whole, rows, columns"):
        run(CombineVectors(None, [one], np.ones((2, 1)), "row"))
    with pytest.raises(ArgumentError, match="out_dtype I32 is not floating point"):
        run(CombineVectors(None, [one], np.ones((2, 1)), "rows", "I32"))
