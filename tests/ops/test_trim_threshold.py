"""trim_threshold: ties in the order of their index, and the reference's thresholds exactly on every backend."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.native._arguments import flat
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import NATIVE
from pymerge.common.shapes import NOTHING
from pymerge.errors import ArgumentError
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold
from pymerge.testing.cases import FLOATS, LAYOUTS, implementations, task_case
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.sparse import SHAPES, SIZES, inputs, on_cpu, weights

WIDTHS = (torch.float64, torch.float32, torch.float64)
BACKENDS = ["reference", *[name for name, device in implementations("trim_threshold") if device == "cpu"]]


@pytest.mark.parametrize(("backend", "device"), implementations("trim_threshold"))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("with_base", [True, False])
def test_backends_give_the_references_thresholds(backend: str, device: str, ties: bool, with_base: bool) -> None:
    run = Runner(backend, device)
    for size in (*SIZES, 70_001):
        case = inputs(size, device, ties=ties)
        base, experts = on_cpu(case)
        for share in (0.0, 0.1, 0.5, 0.9999):
            counts = [int(share * size), size, min(1, size)]
            expected = TrimThreshold(base if with_base else None, experts, counts).reference()
            found = run(TrimThreshold(case.base if with_base else None, case.experts, counts))
            assert_same_results(f"{counts}", found, expected)
    assert run.choices["trim_threshold"].backend == backend


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float64, *FLOATS), repeat=2)), ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_are_the_same_in_cpp(dtypes: tuple[torch.dtype, ...], ties: bool) -> None:
    base, experts = weights((600, 1000), *dtypes, dtypes[1], ties=ties)
    for count in (1, 1000, 300_000, 599_999):
        op = TrimThreshold(base, experts, [count, 600_000])
        expected = op.reference()
        assert_same_results(str(count), Runner("native")(op), expected)
        assert expected.ends[1] == 600_000


def test_a_threshold_says_how_many_ties_are_kept() -> None:
    base, expert = torch.zeros(6), torch.tensor([2.0, -1.0, 1.0, 0.5, 1.0, -3.0])
    one = int(torch.tensor(1.0).view(torch.int32))
    for backend, origin in itertools.product(BACKENDS, (base, None)):
        found = [Runner(backend)(TrimThreshold(origin, [expert], [count])) for count in (0, 3, 4, 5, 6)]
        assert [int(each.keys[0]) for each in found] == [NOTHING, one, one, one, 0]
        assert [int(each.ends[0]) for each in found] == [0, 2, 3, 6, 6]  # 6: all of them


@pytest.mark.parametrize("ties", [False, True])
def test_each_task_is_searched_in_its_own_precision(ties: bool) -> None:
    """Float64 beside others: exact in each digit, over several segments, on any number of threads."""
    base, experts = weights((600, 1000), torch.bfloat16, torch.float64, torch.bfloat16, torch.float64, ties=ties)
    if not ties:  # the last digits alone differ
        experts[2] = base.double() + 1.0 + 2.0**-52 * torch.randperm(600_000).view(600, 1000)
    for count in (1, 123_456, 599_999):
        op = TrimThreshold(base, experts, [count, count, count])
        expected = op.reference()
        for threads in (1, 3):
            assert_same_results(f"{count}", in_cpp(op, threads), expected)
            assert_same_results(f"{count}", in_cpp(with_arrays(op), threads), expected)
        kept = [(expert.to(wide) - base.to(wide)).abs() for expert, wide in zip(experts, WIDTHS, strict=True)]
        for sizes, key in zip(kept, expected.keys.tolist(), strict=True):
            last = sizes.flatten().sort(descending=True).values[count - 1]
            assert key == int(last.view(torch.int64 if last.dtype == torch.float64 else torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_misleads_changes_nothing(dtype: torch.dtype) -> None:
    """Large and small elements in runs: a sample of a few runs is now and then far from how many there are of each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        sizes = torch.rand(1024, 16, generator=generator, dtype=dtype) + 1.0
        sizes *= torch.where(torch.randperm(1024, generator=generator) < 512, 100.0, 1.0)[:, None]
        ordered = sizes.flatten().sort(descending=True).values
        for count in (8_191, 8_193):
            found = in_cpp(TrimThreshold(None, [sizes], [count]), 1)
            assert int(found.keys[0]) == int(
                ordered[count - 1].view(torch.int32 if dtype == torch.float32 else torch.int64)
            )
            assert int(found.ends[0]) == sizes.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_float64_is_larger_than_infinity(backend: str) -> None:
    expert = torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0, math.inf], dtype=torch.float64)
    found = Runner(backend)(TrimThreshold(None, [expert] * 5, [1, 2, 3, 4, 5]))
    infinity = int(torch.tensor(math.inf, dtype=torch.float64).view(torch.int64))
    assert int(found.keys[0]) > infinity
    assert found.keys[1:3].tolist() == [infinity, infinity]
    assert found.ends[:4].tolist() == [6, 3, 6, 6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_thread_counts_change_nothing(layout: str) -> None:
    case = task_case((300, 1111), [torch.bfloat16, torch.bfloat16, torch.float32], layout=layout)
    packed = case.to(torch.float32)
    found = [
        in_cpp(TrimThreshold(base, experts, [100_000, 1]), threads)
        for base, experts in ((case.base, case.experts), (packed.base, packed.experts))
        for threads in (1, 2, 3)
    ]
    for other in found[1:]:
        assert_same_results(layout, other, found[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_give_the_same_thresholds(shape: tuple[int, ...]) -> None:
    run, numel = Runner("native"), math.prod(shape)
    base, experts = weights(shape, torch.bfloat16, torch.float16, torch.float32, ties=True)
    for origin in (base, None):
        op = TrimThreshold(origin, experts, [numel // 3, numel])
        assert_same_results(str(shape), run(with_arrays(op)), run(op))


def test_what_does_not_fit_is_an_error() -> None:
    run, base = Runner("auto"), torch.zeros(4)
    with pytest.raises(ArgumentError, match="count 5 of 4 elements; give 0 to 4"):
        run(TrimThreshold(base, [base], [5]))
    with pytest.raises(ArgumentError, match="2 counts for 1 experts"):
        run(TrimThreshold(base, [base], [1, 2]))
    with pytest.raises(ArgumentError, match="no tensors were given"):
        run(TrimThreshold(None, [], []))


def select(module: ModuleType, base: Tensor, experts: list[Tensor], counts: list[int]) -> Thresholds:
    """What the kernels write in CUDA C++, emulated on a CPU."""
    scratch = torch.zeros(module.trim_threshold_scratch(len(experts), base.numel()), dtype=torch.uint8)
    keys, ends = np.full((2, len(experts)), -1)
    addresses = keys.ctypes.data, ends.ctypes.data, scratch.data_ptr()
    module.trim_threshold(*addresses, flat(base), [flat(expert) for expert in experts], counts, 0)
    return Thresholds(keys, ends)


def assert_selected(module: ModuleType, base: Tensor, experts: list[Tensor], counts: list[int]) -> Thresholds:
    """Bit for bit what the reference selects."""
    found = select(module, base, experts, counts)
    assert_same_results(f"{counts}", found, TrimThreshold(base, experts, counts).reference())
    return found


# Around a thread's elements, a block's and a block's part of 32,768 of them; then all dtypes in two parts.
@pytest.mark.parametrize(
    ("size", "dtypes"),
    [
        *((size, FLOATS[::2]) for size in (2, 3, 17, 2049, 8191, 8193, 32_769)),
        *((33_333, dtypes) for dtypes in itertools.product(FLOATS, repeat=2)),
    ],
    ids=str,
)
def test_the_references_thresholds(emulated: ModuleType, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    case = task_case((1, size), [dtypes[0], dtypes[1], dtypes[1]])
    base, experts = case.base[0], [expert[0] for expert in case.experts]
    experts[1][: size // 2] = base[: size // 2].to(dtypes[1])  # many zeros: weights that were not trained
    for counts in ([1, size - 1], [max(1, size // 5), max(1, size // 3)]):
        assert_selected(emulated, base, experts, counts)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_end_at_their_index(emulated: ModuleType, dtype: torch.dtype) -> None:
    """A handful of magnitudes over several parts: every count but a few ends among equal elements."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(70_000, dtype=dtype)
    expert = (torch.randint(-4, 5, (70_000,), generator=generator) / 8).to(dtype)
    counts = [1, 7_777, 20_000, 31_111, 55_555, 69_999]
    found = assert_selected(emulated, base, [expert] * len(counts), counts)
    assert int((found.ends < 70_000).sum()) >= 5


def test_elements_with_equal_upper_bits(emulated: ModuleType) -> None:
    """One high digit for all, so that the low one decides; and the boundary between what is a bfloat16 and is not."""
    bits = torch.arange(40_000, dtype=torch.int32) % 30_000 + int(torch.tensor(1.5).view(torch.int32))
    expert = bits.view(torch.float32)[torch.randperm(40_000, generator=torch.Generator().manual_seed(0))]
    counts = [1, 2, 5_000, 19_999, 20_000, 39_997, 39_998, 39_999]
    assert_selected(emulated, torch.zeros(40_000), [expert] * len(counts), counts)


@pytest.mark.parametrize("exponent", [-140, -33, -31, 1, 60, 127])
def test_magnitudes_beyond_the_table_in_shared_memory(emulated: ModuleType, exponent: int) -> None:
    generator = torch.Generator().manual_seed(0)
    expert = torch.randn(9_000, generator=generator).clamp(-1.9, 1.9) * 2.0**exponent
    counts = [1, 100, 4_500, 8_999]
    assert_selected(emulated, torch.zeros(9_000), [expert] * len(counts), counts)


def test_nan_is_larger_than_infinity(emulated: ModuleType) -> None:
    expert = torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0, math.inf])
    found = assert_selected(emulated, torch.zeros(6), [expert] * 5, [1, 2, 3, 4, 5])
    infinity = int(torch.tensor(math.inf).view(torch.int32))
    assert found.keys[1:3].tolist() == [infinity, infinity]
    assert found.ends[:4].tolist() == [6, 3, 6, 6]


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_that_start_anywhere(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Loads of several elements need aligned addresses; views into larger tensors have none."""
    case = task_case((1, 8_200), [dtype] * 3)
    for first, second in ((0, 1), (3, 0), (1, 3)):
        base, expert = case.base[0, first:][:8_190], case.experts[0][0, second:][:8_190]
        assert_selected(emulated, base, [expert], [4_000])


def test_what_is_refused(emulated: ModuleType) -> None:
    one = torch.zeros(5)
    with pytest.raises(ValueError, match="count 5 of 5 elements"):
        select(emulated, one, [one], [5])
    with pytest.raises(ValueError, match="1 experts, 2 counts; give one of each"):
        select(emulated, one, [one], [1, 2])
    with pytest.raises(ValueError, match="expert 1 is float64; use the reference"):
        select(emulated, one, [one, one.double()], [1, 2])
    with pytest.raises(ValueError, match="129 task vectors; one launch takes 128"):
        select(emulated, one, [one] * 129, [1] * 129)
    with pytest.raises(ValueError, match=r"counters hold less than 2\^32"):
        emulated.trim_threshold(0, 0, 0, (0, NATIVE["F32"], 2**32), [], [], 0)
