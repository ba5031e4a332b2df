"""magnitude_mask: exactly the largest elements, on every backend; integers decide, so all agree bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold
from pymerge.testing.cases import LAYOUTS, implementations, task_case
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.oracles import kept_magnitudes
from tests.helpers.sparse import SHAPES, SIZES, assert_masks, delta, flags, inputs, on_cpu, weights

RUNS = implementations("magnitude_mask")
# Triton, which is slow where it is interpreted, is compared with the reference on smaller shapes.
BACKENDS = ["reference", *[name for name, device in RUNS if device == "cpu" and name != "triton"]]

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def counts(numel: int) -> list[int]:
    return sorted({0, min(1, numel), numel // 3, numel // 2, max(0, numel - 1), numel})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_the_largest_are_kept(backend: str, shape: tuple[int, ...], ties: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, ties=ties)
    run, numel = Runner(backend), math.prod(shape)
    for many, few in itertools.product(counts(numel), repeat=2):
        if few > many:
            continue
        kept = run(TrimThreshold(base, experts, [many, numel]))
        dropped = run(TrimThreshold(base, experts, [few, 0]))
        masks = run(MagnitudeMask(base, experts, kept, dropped))
        for mask, expert, (begin, end) in zip(flags(masks, shape), experts, [(few, many), (0, numel)], strict=True):
            np.testing.assert_array_equal(mask, kept_magnitudes(delta(base, expert), begin, end))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_selected_in_float64(backend: str) -> None:
    base = torch.zeros(100, dtype=torch.float64)
    expert = 1.0 + 1e-12 * torch.randperm(100, generator=torch.Generator().manual_seed(0)).double()
    for origin in (base, None):
        kept = Runner(backend)(TrimThreshold(origin, [expert], [10]))
        masks = Runner(backend)(MagnitudeMask(origin, [expert], kept))
        np.testing.assert_array_equal(flags(masks, (100,))[0], kept_magnitudes(expert.numpy(), 0, 10))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_float64_beside_other_dtypes(share: float) -> None:
    """Several segments of a thread; each task in its own precision; norms in float64."""
    base, experts = weights((300, 333), torch.bfloat16, torch.float64, torch.bfloat16, torch.float64)
    count = int(share * 99_900)
    kept, dropped = (TrimThreshold(base, experts, [each] * 3).reference() for each in (count, count // 3))
    op = MagnitudeMask(base, experts, kept, dropped)
    expected = op.reference()
    for threads in (1, 3):
        assert_masks(f"{threads}", in_cpp(op, threads), expected)
        assert_same_results(f"{threads}", in_cpp(with_arrays(op), threads), in_cpp(op, 1))
    assert [int(mask.sum()) for mask in flags(expected, (300, 333))] == [count - count // 3] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_float64_is_the_largest(backend: str) -> None:
    expert = torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0], dtype=torch.float64)
    run = Runner(backend)
    for count, expected in ((0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3])):
        masks = run(MagnitudeMask(None, [expert], run(TrimThreshold(None, [expert], [count]))))
        assert np.flatnonzero(flags(masks, (5,))[0]).tolist() == expected
        assert math.isnan(masks.before[0])
        assert math.isnan(masks.after[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_the_largest_and_stays_in_the_norms(backend: str) -> None:
    base, expert = torch.zeros(5), torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0])
    run = Runner(backend)
    for count, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3])):
        masks = run(MagnitudeMask(base, [expert], run(TrimThreshold(base, [expert], [count]))))
        assert np.flatnonzero(flags(masks, (5,))[0]).tolist() == expected
        assert math.isnan(masks.before[0])


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_backends_give_the_references_masks(backend: str, device: str, size: int, ties: bool) -> None:
    case, run = inputs(size, device, ties=ties), Runner(backend, device)
    kept = TrimThreshold(*on_cpu(case), [size // 2, size, 0]).reference()
    for dropped in (None, TrimThreshold(*on_cpu(case), [size // 5, min(1, size), 0]).reference()):
        op = MagnitudeMask(case.base, case.experts, kept, dropped)
        assert_masks(f"{size}", run(op), op.reference())
        assert run.choices[op.name].backend == backend


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("size", [1, 65, 2111])
def test_without_a_base_the_experts_are_the_vectors(backend: str, device: str, size: int) -> None:
    case = inputs(size, device)
    kept = TrimThreshold(None, on_cpu(case)[1], [size // 2, size, 0]).reference()
    op = MagnitudeMask(None, case.experts, kept)
    expected = MagnitudeMask(torch.zeros_like(case.base), case.experts, kept).reference()
    assert_masks("backend", Runner(backend, device)(op), expected)
    assert_masks("reference", op.reference(), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_masks_of_other_layouts_and_shapes(backend: str, device: str) -> None:
    run, packed = Runner(backend, device), inputs(77, device)
    kept = TrimThreshold(*on_cpu(packed), [30, 20, 10]).reference()
    expected = run(MagnitudeMask(packed.base, packed.experts, kept))
    for layout, shape in zip(LAYOUTS, [(1, 77), (7, 11), (77,), (7, 1, 11)], strict=True):
        case = inputs(77, device, layout)
        base, experts = case.base.reshape(shape), [expert.reshape(shape) for expert in case.experts]
        assert_masks(f"{layout} {shape}", run(MagnitudeMask(base, experts, kept)), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_what_is_not_finite_stays_in_the_norms(backend: str, device: str) -> None:
    base, expert = torch.zeros(5, device=device), torch.tensor([1.0, math.inf, -math.inf, 2.0, 0.0], device=device)
    for count, infinite in ((1, True), (0, False)):
        op = MagnitudeMask(base, [expert], TrimThreshold(base, [expert], [count]).reference())
        found = Runner(backend, device)(op)
        assert_masks(f"{count}", found, op.reference())
        assert math.isinf(found.before[0])
        assert math.isnan(found.after[0])  # what is left out is multiplied by 0
        assert bool(found.bits.any()) == infinite


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_thread_counts_change_no_bit(layout: str) -> None:
    case = task_case((300, 1111), [torch.bfloat16, torch.bfloat16, torch.float32], layout=layout)
    packed = case.to(torch.float32)
    kept = TrimThreshold(packed.base, packed.experts, [100_000, 1]).reference()
    found = [
        in_cpp(MagnitudeMask(base, experts, kept), count)
        for base, experts in ((case.base, case.experts), (packed.base, packed.experts))
        for count in (1, 2, 3)
    ]
    for other in found[1:]:
        assert_same_results(layout, other, found[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_give_the_same_bits(shape: tuple[int, ...]) -> None:
    run, numel = Runner("native"), math.prod(shape)
    base, experts = weights(shape, torch.bfloat16, torch.float16, torch.float32, ties=True)
    for origin in (base, None):
        kept = run(TrimThreshold(origin, experts, [numel // 2, numel]))
        op = MagnitudeMask(origin, experts, kept, run(TrimThreshold(origin, experts, [numel // 5, 0])))
        assert_same_results(str(shape), run(with_arrays(op)), run(op))


def test_what_does_not_fit_is_an_error() -> None:
    run, base = Runner("auto"), torch.zeros(4)
    one = Thresholds(np.array([1]), np.array([1]))
    with pytest.raises(ArgumentError, match="1 thresholds for 2 experts; take them from trim_threshold"):
        run(MagnitudeMask(base, [base, base], one))
    with pytest.raises(ArgumentError, match="thresholds are int32; give contiguous arrays of int64"):
        run(MagnitudeMask(base, [base], Thresholds(*(each.astype("int32") for each in one))))
    with pytest.raises(ArgumentError, match="no tensors were given"):
        run(MagnitudeMask(None, [], one))
