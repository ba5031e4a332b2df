"""sparse_combine: the formula in float64, C++ and Triton against PyTorch bit for bit, masks as bits and thresholds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.sparse_combine import SparseCombine
from pymerge.ops.trim_threshold import TrimThreshold
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_same
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.oracles import sparse_delta
from tests.helpers.sparse import random_bits

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
    op = SparseCombine(
        case.base, case.experts, WEIGHTS, DOUBLE, bits=bits if masked else None, factors=FACTORS, **options
    )
    found = op.reference()
    precision = 1e-14 if dtype == DOUBLE else 3e-6
    exact = case.base.double().numpy() + expected
    # Divisors of both signs may nearly cancel.
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=precision * np.abs(exact).max())


@pytest.mark.parametrize(("backend", "device", "size"), RUNS_OF_SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_backends(backend: str, device: str, size: int, masked: bool) -> None:
    run, triton = Runner(backend, device), backend == "triton"
    known = FLOATS if triton else (*FLOATS, DOUBLE)
    calls = list(itertools.product(OPTIONS, (None, *known), (None, FACTORS)))
    bits = random_bits(3, size)[0] if masked else None
    mixes = itertools.islice(itertools.cycle(itertools.product(known, repeat=4)), 0, 256, 37)
    for index, dtypes in enumerate(mixes):
        base, experts = values(size, dtypes)
        # In the interpreter each call is slow: all of them once, spread over the dtypes.
        for options, out_dtype, factors in calls[index::7] if triton else calls:
            label = f"{backend} {size} {dtypes} -> {out_dtype} {options}"
            here = SparseCombine(base, experts, WEIGHTS, out_dtype, bits=bits, factors=factors, **options)
            moved = [tensor.to(device) for tensor in (base, *experts)]
            there = None if bits is None else bits.to(device)
            op = SparseCombine(moved[0], moved[1:], WEIGHTS, out_dtype, bits=there, factors=factors, **options)
            assert_same(label, run(op), here.reference())
            assert run.choices[op.name].backend == backend


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: str, shape: tuple[int, int], layout: str) -> None:
    run = Runner(backend, device)
    case = task_case(shape, [torch.float32, torch.bfloat16, torch.float16], device=device, layout=layout)
    packed = [expert.contiguous() for expert in case.experts]
    bits = random_bits(2, shape[0] * shape[1])[0].to(device)
    found = run(SparseCombine(case.base, case.experts, WEIGHTS[:2], bits=bits, elect=True))
    expected = run(SparseCombine(case.base.contiguous(), packed, WEIGHTS[:2], bits=bits, elect=True))
    assert_same(layout, found, expected)
    assert found.shape == shape


def test_what_is_not_finite_shows_even_where_it_is_masked() -> None:
    base, experts = torch.zeros(3), [torch.tensor([math.nan, math.inf, 1.0]), torch.ones(3)]
    nothing = torch.zeros(2, 8, dtype=torch.uint8)
    for elect, bits in itertools.product((False, True), (None, nothing)):
        found = SparseCombine(base, experts, [1.0, 1.0], bits=bits, elect=elect).reference()
        assert torch.isfinite(found).tolist() == [False, False, True]


def test_signs_are_elected_by_weight_and_zero_is_plus() -> None:
    base = torch.zeros(4)
    experts = [torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.tensor([-1.0, -1.0, 0.0, 5.0])]
    for backend in ("reference", "native"):

        def merged(weights: list[float], backend: str = backend, **options: bool) -> Any:
            return Runner(backend)(SparseCombine(base, experts, weights, **options)).tolist()

        assert merged([1.0, 1.0], elect=True) == [3.0, 1.0, 0.0, 5.0]
        assert merged([1.0, 4.0], elect=True) == [-4.0, -4.0, 0.0, 20.0]
        assert merged([1.0, 4.0], elect=True, normalize=True) == [-1.0, -1.0, 0.0, 5.0]
        assert merged([1.0, -1.0], normalize=True) == [4.0, 2.0, 0.0, -7.0]


def test_thread_count_changes_nothing() -> None:
    case = task_case((300, 700), [torch.bfloat16, torch.bfloat16, torch.float32])
    bits = random_bits(2, 300 * 700)[0]
    kept = TrimThreshold(case.base, case.experts, [100_000, 70_000]).reference()
    for mask in ({"bits": bits}, {"kept": kept}):
        op = SparseCombine(case.base, case.experts, WEIGHTS[:2], torch.float32, elect=True, **mask)
        results = [in_cpp(op, count) for count in (1, 2, 3)]
        assert_same("2 threads", results[1], results[0])
        assert_same("3 threads", results[2], results[0])


@pytest.mark.parametrize(("backend", "device", "size"), RUNS_OF_SIZES)
@pytest.mark.parametrize("with_dropped", [False, True])
def test_thresholds_select_what_their_masks_do(backend: str, device: str, size: int, with_dropped: bool) -> None:
    known = FLOATS if backend == "triton" else (*FLOATS, DOUBLE)
    for options, dtypes in zip(OPTIONS, itertools.cycle(itertools.product(known, repeat=2)), strict=False):
        base, experts = values(size, (*dtypes, *dtypes))
        kept = TrimThreshold(base, experts, [size // 2, size, size // 3]).reference()
        dropped = TrimThreshold(base, experts, [size // 5, 0, size // 3]).reference() if with_dropped else None
        bits = MagnitudeMask(base, experts, kept, dropped).reference().bits
        expected = SparseCombine(base, experts, WEIGHTS, bits=bits, factors=FACTORS, **options).reference()
        moved = [tensor.to(device) for tensor in (base, *experts)]
        op = SparseCombine(moved[0], moved[1:], WEIGHTS, kept=kept, dropped=dropped, factors=FACTORS, **options)
        assert_same(f"{size} {dtypes} {options}", Runner(backend, device)(op), expected)
        assert_same(f"reference {size} {dtypes} {options}", op.reference(), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["none", "bits", "kept", "kept and dropped"])
def test_arrays_give_the_same_bits(size: int, mask: str) -> None:
    run = Runner("native")
    for dtypes in itertools.product((*FLOATS, DOUBLE), repeat=2):
        base, experts = values(size, (*dtypes, torch.float32, torch.bfloat16))
        kept = dropped = None
        if mask.startswith("kept"):
            kept = TrimThreshold(base, experts, [size // 2, size, size // 3]).reference()
        if mask == "kept and dropped":
            dropped = TrimThreshold(base, experts, [size // 5, 0, size // 3]).reference()
        bits = random_bits(3, size)[0] if mask == "bits" else None
        op = SparseCombine(base, experts, WEIGHTS, "F32", bits, kept, dropped, FACTORS, elect=True, normalize=True)
        found = run(with_arrays(op))
        assert isinstance(found, Array)
        assert_same_results(f"{dtypes}", found, run(op))


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_a_result_is_written_where_it_is_wanted(backend: str, device: str) -> None:
    case = task_case((13, 77), [torch.bfloat16] * 3, device=device)
    run, out = Runner(backend, device), torch.full((13, 77), math.nan, device=device)
    assert run(SparseCombine(case.base, case.experts, WEIGHTS[:2], "F32", out=out)) is out
    assert_same("out", out, run(SparseCombine(case.base, case.experts, WEIGHTS[:2], "F32")))
    if backend == "native":
        room = Array.mapped(out.nbytes).at(0, "F32", (13, 77))
        assert run(with_arrays(SparseCombine(case.base, case.experts, WEIGHTS[:2], "F32", out=room))) is room
        assert_same("array", room.tensor(), out)


def test_what_does_not_fit_is_an_error() -> None:
    run, base = Runner("auto"), torch.zeros(4)
    kept, bits = TrimThreshold(base, [base], [2]).reference(), torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"torch.uint8 of shape \(1, 1\), expected uint8 of \(1, 8\)"):
        run(SparseCombine(base, [base], [1.0], bits=torch.zeros(1, 1, dtype=torch.uint8)))
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int32 is not floating point"):
        run(SparseCombine(base, [base], [1.0], torch.int32))
    for wrong in ({"bits": bits, "kept": kept}, {"bits": bits, "dropped": kept}, {"dropped": kept}):
        with pytest.raises(ArgumentError, match="masks are bits, or thresholds"):
            run(SparseCombine(base, [base], [1.0], **wrong))
    with pytest.raises(ArgumentError, match="1 thresholds for 2 experts"):
        run(SparseCombine(base, [base, base], [1.0, 1.0], kept=kept))
    with pytest.raises(ArgumentError, match="out is in the memory of an input"):
        run(SparseCombine(base, [base], [1.0], out=base))
