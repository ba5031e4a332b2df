"""combine on every backend: bit for bit the reference in C++, near it in Triton."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner, choose
from pymerge.common.arrays import Array
from pymerge.common.devices import resolve_device
from pymerge.errors import ArgumentError
from pymerge.ops import combine as sums
from pymerge.ops.combine import Combine
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays

WEIGHTS = (0.3, -1.7)
DOUBLE = torch.float64
RUNS = implementations("combine")

# Sizes around the 1024 elements of a block, and a chunk of 16384 with a tail; Triton's interpreter takes few.
SIZES = (0, 1, 7, 1023, 1025, 17500)
SIZED_RUNS = [(*run, size) for run in RUNS for size in SIZES if run[0] != "triton" or size in (0, 1, 1025)]

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def values(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Magnitudes from float16's subnormals to its overflow, both zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-9, 6, (size,), generator=generator)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.0, 65520.0, 6e-8, 3.4e38])
    places = torch.randperm(size, generator=generator)[: len(special)]
    x[places] = special[: len(places)]
    return x.to(dtype)


@pytest.mark.parametrize(("backend", "device", "size"), SIZED_RUNS)
@pytest.mark.parametrize("base_dtype", [None, *FLOATS, DOUBLE])
def test_combine(backend: str, device: str, size: int, base_dtype: torch.dtype | None) -> None:
    run = Runner(backend, device)
    known = FLOATS if backend == "triton" else (*FLOATS, DOUBLE)
    if base_dtype not in (None, *known):
        assert "float64" in choose("combine", resolve_device(device), frozenset({"F64"}), backend).reason
        return
    base = None if base_dtype is None else values(size, base_dtype, 1).to(device)
    pairs = (
        list(itertools.pairwise((*known, known[0])))
        if backend == "triton"
        else list(itertools.product(known, repeat=2))
    )
    for index, dtypes in enumerate(pairs):
        tensors = [values(size, dtype, 2 + 2 * index + t).to(device) for t, dtype in enumerate(dtypes)]
        for out_dtype in (None, *known):
            label = f"{backend} {size} {base_dtype} {dtypes} -> {out_dtype}"
            divisor = 1.0 if index % 2 else 1.3
            op = Combine(base, tensors, WEIGHTS, out_dtype, None, divisor)
            actual, expected = run(op), op.reference()
            assert run.choices["combine"].backend == backend
            if backend == "triton":
                wide = [None if base is None else base.double(), [tensor.double() for tensor in tensors]]
                rounded = [float(torch.tensor(weight)) for weight in WEIGHTS]
                truth = Combine(*wide, rounded, DOUBLE, None, divisor).reference()
                assert_accurate(label, actual, expected, truth)
            else:
                assert_same(label, actual, expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_combine_layouts(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    run = Runner(backend, device)
    case = task_case(shape, [torch.float32, torch.bfloat16, torch.float16], device=device, layout=layout)
    packed = [expert.contiguous() for expert in case.experts]
    actual, contiguous = (
        run(Combine(case.base, case.experts, WEIGHTS)),
        Combine(case.base.contiguous(), packed, WEIGHTS),
    )
    assert_same("contiguous inputs", actual, run(contiguous))
    truth = Combine(case.base.double(), [expert.double() for expert in packed], WEIGHTS, DOUBLE).reference()
    assert_accurate(layout, actual, contiguous.reference(), truth)


def test_every_16_bit_value_survives() -> None:
    """All 65,536 patterns of both 16-bit types, through float32 and back."""
    run = Runner("native")
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        tensor = patterns.view(dtype)
        assert_same(f"{dtype} up", run(Combine(None, [tensor], [1.0], torch.float32)), tensor.float() + 0.0)
        assert_same(f"{dtype} back", run(Combine(None, [tensor], [1.0])), tensor + 0.0)


def test_rounding_to_16_bits() -> None:
    """Halfway between all neighbours of both types, and just beside: ties to even, as in PyTorch."""
    run = Runner("native")
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(0, 1 << 15, dtype=torch.int16).view(dtype)
        x = x[torch.isfinite(x)].double()
        middle = ((x[1:] + x[:-1]) / 2).float()
        infinity = torch.tensor(float("inf"))
        near = torch.cat([middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])
        near = torch.cat([near, -near])
        assert_same(str(dtype), run(Combine(None, [near], [1.0], dtype)), (near + 0.0).to(dtype))


def test_thread_count_does_not_change_combine() -> None:
    case = task_case((300, 700), [torch.bfloat16, torch.bfloat16, torch.float32])
    op = Combine(case.base, case.experts, WEIGHTS, torch.float32)
    results = [in_cpp(op, count) for count in (1, 2, 3)]
    assert_same("2 threads", results[1], results[0])
    assert_same("3 threads", results[2], results[0])


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_reference_is_the_formula_block_by_block(
    with_base: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = task_case((63, 65), [dtype] * 3)
    op = Combine(case.base if with_base else None, case.experts, WEIGHTS, divisor=1.3)
    whole = op.reference()
    monkeypatch.setattr(sums, "SUM_ELEMENTS", 64)
    assert_same("blocks", op.reference(), whole)
    base, *experts = (tensor.double().numpy() for tensor in (case.base, *case.experts))
    origin = base if with_base else 0.0
    total = sum(weight * (expert - origin) for weight, expert in zip(WEIGHTS, experts, strict=True))
    precision = 1e-15 if dtype == DOUBLE else 1e-7
    np.testing.assert_allclose(whole.double().numpy(), origin + total / 1.3, rtol=0, atol=precision)


def test_scratch_is_that_of_a_block() -> None:
    assert Combine.scratch((10, 3), 2, native=False) == 16 * 30
    assert Combine.scratch((2**12, 2**12), 2, native=False) == 16 * 2**20
    assert Combine.scratch((2**12, 2**12), 2, native=True) == 0


@pytest.mark.parametrize("size", [0, 1, 1025, 17500])
@pytest.mark.parametrize("with_base", [True, False])
def test_arrays_give_the_same_bits(size: int, with_base: bool) -> None:
    run = Runner("native")
    for dtypes in itertools.product((*FLOATS, DOUBLE), repeat=2):
        base, *tensors = (values(size, dtype, seed) for seed, dtype in enumerate((torch.bfloat16, *dtypes)))
        for out_dtype in (None, *FLOATS, DOUBLE):
            op = Combine(base if with_base else None, tensors, WEIGHTS, out_dtype, None, 1.3)
            found = run(with_arrays(op))
            assert isinstance(found, Array)
            assert_same_results(f"{dtypes} -> {out_dtype}", found, run(op))


def test_an_array_is_written_where_it_is_wanted() -> None:
    base, *tensors = (values(1025, torch.float32, seed) for seed in range(3))
    out = Array.mapped(2 * 1025).at(0, "BF16", (1025,))
    for run in (Runner("native"), Runner("reference")):
        found = run(with_arrays(Combine(base, tensors, WEIGHTS, "BF16", out)))
        assert found is out or isinstance(found, Tensor)
        assert_same("out", out.tensor(), Combine(base, tensors, WEIGHTS, "BF16").reference())


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_result_is_written_where_it_is_wanted(backend: str, device: str, with_base: bool) -> None:
    base, *tensors = (values(1025, torch.float32, seed).to(device) for seed in range(3))
    origin = base if with_base else None
    run, out = Runner(backend, device), torch.full_like(base, float("nan"))
    assert run(Combine(origin, tensors, WEIGHTS, torch.float32, out)) is out
    assert_same("out", out, run(Combine(origin, tensors, WEIGHTS, torch.float32)))


def test_an_out_that_does_not_fit_is_refused() -> None:
    base, first, second = torch.zeros(3, 4, 5)
    Combine(base, [first], [1.0], None, torch.empty(4, 5)).check()
    wrong = (torch.empty(5, 4), torch.empty(4, 5, dtype=torch.bfloat16), torch.empty(5, 4).mT)
    for out in wrong:
        with pytest.raises(
            ArgumentError, match=r"combine: out is .*; give a contiguous tensor of torch.float32 \(4, 5\)"
        ):
            Combine(base, [first], [1.0], None, out).check()
    with pytest.raises(ArgumentError, match="out is in the memory of an input"):
        Combine(base, [first], [1.0], None, second).check()


def test_what_does_not_fit_is_an_error() -> None:
    one = torch.zeros(3)
    with pytest.raises(ArgumentError, match="combine: no tensors were given; pass at least one"):
        Combine(None, [], []).check()
    with pytest.raises(ArgumentError, match="combine: no experts were given; pass at least one"):
        Combine(one, [], []).check()
    with pytest.raises(ArgumentError, match="2 weights for 1 experts"):
        Combine(one, [one], [1.0, 1.0]).check()
    with pytest.raises(ArgumentError, match="the divisor is 0; give another number"):
        Combine(one, [one], [1.0], divisor=0.0).check()
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int32 is not floating point"):
        Combine(one, [one], [1.0], torch.int32).check()
