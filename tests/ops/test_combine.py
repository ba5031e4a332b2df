"""combine on every compiled backend: bit for bit the reference in C++ and CUDA, near it in Triton."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import load
from pymerge.errors import ArgumentError
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

REFERENCE = OPS["combine"].reference
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
    function = load(backend).implementations()["combine"]
    known = FLOATS if backend == "triton" else (*FLOATS, DOUBLE)
    if base_dtype not in (None, *known):
        assert "float64" in str(load(backend).refuses("combine", frozenset({DOUBLE})))
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
            actual = function(base, tensors, WEIGHTS, out_dtype, None, divisor)
            expected = REFERENCE(base, tensors, WEIGHTS, out_dtype, None, divisor)
            if backend == "triton":
                wide = [None if base is None else base.double(), [tensor.double() for tensor in tensors]]
                truth = REFERENCE(*wide, [float(torch.tensor(w)) for w in WEIGHTS], DOUBLE, None, divisor)
                assert_accurate(label, actual, expected, truth)
            else:
                assert_same(label, actual, expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_combine_layouts(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    function = load(backend).implementations()["combine"]
    case = task_case(shape, [torch.float32, torch.bfloat16, torch.float16], device=device, layout=layout)
    packed = [expert.contiguous() for expert in case.experts]
    actual = function(case.base, case.experts, WEIGHTS)
    assert_same("contiguous inputs", actual, function(case.base.contiguous(), packed, WEIGHTS))
    truth = REFERENCE(case.base.double(), [expert.double() for expert in packed], WEIGHTS, DOUBLE)
    assert_accurate(layout, actual, REFERENCE(case.base.contiguous(), packed, WEIGHTS), truth)


def test_every_16_bit_value_survives() -> None:
    """All 65,536 patterns of both 16-bit types, through float32 and back."""
    function = load("native").implementations()["combine"]
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        tensor = patterns.view(dtype)
        assert_same(f"{dtype} up", function(None, [tensor], [1.0], torch.float32), tensor.float() + 0.0)
        assert_same(f"{dtype} back", function(None, [tensor], [1.0]), tensor + 0.0)


def test_rounding_to_16_bits() -> None:
    """Halfway between all neighbours of both types, and just beside: ties to even, as in PyTorch."""
    function = load("native").implementations()["combine"]
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(0, 1 << 15, dtype=torch.int16).view(dtype)
        x = x[torch.isfinite(x)].double()
        middle = ((x[1:] + x[:-1]) / 2).float()
        infinity = torch.tensor(float("inf"))
        near = torch.cat([middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])
        near = torch.cat([near, -near])
        assert_same(str(dtype), function(None, [near], [1.0], dtype), (near + 0.0).to(dtype))


def test_thread_count_does_not_change_combine() -> None:
    function = load("native").implementations()["combine"]
    case = task_case((300, 700), [torch.bfloat16, torch.bfloat16, torch.float32])
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(function(case.base, case.experts, WEIGHTS, torch.float32))
    torch.set_num_threads(threads)
    assert_same("2 threads", results[1], results[0])
    assert_same("3 threads", results[2], results[0])


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_result_is_written_where_it_is_wanted(backend: str, device: str, with_base: bool) -> None:
    base, *tensors = (values(1025, torch.float32, seed).to(device) for seed in range(3))
    origin = base if with_base else None
    function = load(backend).implementations()["combine"]
    out = torch.full_like(base, float("nan"))
    assert function(origin, tensors, WEIGHTS, torch.float32, out) is out
    assert_same("out", out, function(origin, tensors, WEIGHTS, torch.float32))


def test_an_out_that_does_not_fit_is_refused() -> None:
    base, first, second = torch.zeros(3, 4, 5)
    check = OPS["combine"].check
    check(base, [first], [1.0], None, torch.empty(4, 5))
    wrong = (torch.empty(5, 4), torch.empty(4, 5, dtype=torch.bfloat16), torch.empty(5, 4).mT)
    for out in wrong:
        with pytest.raises(
            ArgumentError, match=r"combine: out is .*; give a contiguous tensor of torch.float32 \(4, 5\)"
        ):
            check(base, [first], [1.0], None, out)
    with pytest.raises(ArgumentError, match="out is in the memory of an input"):
        check(base, [first], [1.0], None, second)
