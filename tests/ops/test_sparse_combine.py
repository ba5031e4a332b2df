"""sparse_combine: against the formula in float64, and C++ and Triton against PyTorch bit for bit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import load
from pymerge.common.shapes import row_bytes
from pymerge.ops import OPS
from pymerge.ops._bitmask import pack
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_same
from tests.helpers.oracles import sparse_delta

REFERENCE = OPS["sparse_combine"].reference
RUNS = implementations("sparse_combine")
DOUBLE = torch.float64
WEIGHTS = [0.3, -1.7, 0.9]
FACTORS = [1.5, 0.8, 2.25]
OPTIONS = [
    {"elect": elect, "normalize": normalize, "scale": scale}
    for elect, normalize, scale in itertools.product((False, True), (False, True), (1.0, -0.7))
]
# Blocks of 1024, a chunk of 16 blocks with a tail; Triton's interpreter takes few.
SIZES = (0, 1, 31, 33, 1025, 17500)
RUNS_OF_SIZES = [(*run, size) for run in RUNS for size in SIZES if run != ("triton", "cpu") or size <= 1025]

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def random_bits(tasks: int, numel: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Masks as the op takes them, and as booleans."""
    generator = torch.Generator().manual_seed(seed)
    keep = [torch.rand(numel, generator=generator) < 0.6 for _ in range(tasks)]
    bits = torch.zeros(tasks, row_bytes(numel), dtype=torch.uint8)
    for row, flags in zip(bits, keep, strict=True):
        packed = pack(flags)
        row[: len(packed)] = packed
    return bits, keep


def values(size: int, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, list[Tensor]]:
    """Deltas of either sign, some of them 0, and values that are not finite."""
    generator = torch.Generator().manual_seed(size)
    base = torch.randint(-8, 9, (size,), generator=generator) / 8
    experts = [base + torch.randint(-3, 4, (size,), generator=generator) / 16 for _ in dtypes[1:]]
    for place, expert in enumerate(experts):
        special = torch.tensor([math.nan, math.inf, -math.inf])[: max(0, size - 5)]
        expert[place : place + len(special)] = special[: max(0, size - place)]
    base, *experts = [tensor.to(dtype) for tensor, dtype in zip([base, *experts], dtypes, strict=True)]
    return base, experts


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, DOUBLE], ids=str)
def test_the_reference_computes_the_formula(options: dict[str, Any], masked: bool, dtype: torch.dtype) -> None:
    case = task_case((63, 65), [dtype] * 4)
    bits, keep = random_bits(3, 63 * 65)
    taus = [(expert.double() - case.base.double()).numpy() for expert in case.experts]
    masks = [flags.view(63, 65).numpy() if masked else np.ones((63, 65), dtype=bool) for flags in keep]
    # What is kept times a factor: the oracle's own rescaling is tested with the methods.
    expected = sparse_delta(
        [tau * factor for tau, factor in zip(taus, FACTORS, strict=True)], masks, WEIGHTS, **options
    )
    found = REFERENCE(
        case.base, case.experts, WEIGHTS, DOUBLE, bits=bits if masked else None, factors=FACTORS, **options
    )
    precision = 1e-14 if dtype == DOUBLE else 3e-6
    exact = case.base.double().numpy() + expected
    # Divisors of both signs may nearly cancel.
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=precision * np.abs(exact).max())


@pytest.mark.parametrize(("backend", "device", "size"), RUNS_OF_SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_backends(backend: str, device: str, size: int, masked: bool) -> None:
    function = load(backend).implementations()["sparse_combine"]
    triton = backend == "triton"
    known = FLOATS if triton else (*FLOATS, DOUBLE)
    calls = list(itertools.product(OPTIONS, (None, *known), (None, FACTORS)))
    bits = random_bits(3, size)[0] if masked else None
    mixes = itertools.islice(itertools.cycle(itertools.product(known, repeat=4)), 0, 256, 37)
    for index, dtypes in enumerate(mixes):
        base, experts = values(size, dtypes)
        # In the interpreter each call is slow: all of them once, spread over the dtypes.
        for options, out_dtype, factors in calls[index::7] if triton else calls:
            label = f"{backend} {size} {dtypes} -> {out_dtype} {options}"
            expected = REFERENCE(base, experts, WEIGHTS, out_dtype, bits=bits, factors=factors, **options)
            moved = [tensor.to(device) for tensor in (base, *experts)]
            there = None if bits is None else bits.to(device)
            actual = function(moved[0], moved[1:], WEIGHTS, out_dtype, bits=there, factors=factors, **options)
            assert_same(label, actual, expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    function = load(backend).implementations()["sparse_combine"]
    case = task_case(shape, [torch.float32, torch.bfloat16, torch.float16], device=device, layout=layout)
    packed = [expert.contiguous() for expert in case.experts]
    bits = random_bits(2, shape[0] * shape[1])[0].to(device)
    found = function(case.base, case.experts, WEIGHTS[:2], bits=bits, elect=True)
    assert_same(layout, found, function(case.base.contiguous(), packed, WEIGHTS[:2], bits=bits, elect=True))
    assert found.shape == shape


def test_what_is_not_finite_shows_even_where_it_is_masked() -> None:
    base, experts = torch.zeros(3), [torch.tensor([math.nan, math.inf, 1.0]), torch.ones(3)]
    nothing = torch.zeros(2, 8, dtype=torch.uint8)
    for elect, bits in itertools.product((False, True), (None, nothing)):
        found = REFERENCE(base, experts, [1.0, 1.0], bits=bits, elect=elect)
        assert torch.isfinite(found).tolist() == [False, False, True]


def test_signs_are_elected_by_weight_and_zero_is_plus() -> None:
    base = torch.zeros(4)
    experts = [torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.tensor([-1.0, -1.0, 0.0, 5.0])]
    for backend in ("reference", "native"):
        function = load(backend).implementations()["sparse_combine"]
        assert function(base, experts, [1.0, 1.0], elect=True).tolist() == [3.0, 1.0, 0.0, 5.0]
        assert function(base, experts, [1.0, 4.0], elect=True).tolist() == [-4.0, -4.0, 0.0, 20.0]
        assert function(base, experts, [1.0, 4.0], elect=True, normalize=True).tolist() == [-1.0, -1.0, 0.0, 5.0]
        assert function(base, experts, [1.0, -1.0], normalize=True).tolist() == [4.0, 2.0, 0.0, -7.0]


def test_thread_count_changes_nothing() -> None:
    function = load("native").implementations()["sparse_combine"]
    case = task_case((300, 700), [torch.bfloat16, torch.bfloat16, torch.float32])
    bits = random_bits(2, 300 * 700)[0]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(function(case.base, case.experts, WEIGHTS[:2], torch.float32, bits=bits, elect=True))
    torch.set_num_threads(threads)
    assert_same("2 threads", results[1], results[0])
    assert_same("3 threads", results[2], results[0])
