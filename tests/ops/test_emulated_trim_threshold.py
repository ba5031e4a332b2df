"""trim_threshold in CUDA C++, emulated on a CPU: the reference's thresholds, exactly."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from pymerge.backends.cuda._sparse import flat_argument
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.ops import OPS
from pymerge.ops.trim_threshold import Thresholds
from pymerge.testing.cases import FLOATS, task_case
from pymerge.testing.compare import assert_same


def select(module: ModuleType, base: Tensor, experts: list[Tensor], counts: list[int]) -> Thresholds:
    """What the kernels write."""
    numel = base.numel()
    scratch = torch.zeros(module.trim_threshold_scratch(len(experts), numel), dtype=torch.uint8)
    keys, ends = torch.full((2, len(experts)), -1)
    inputs = [flat_argument(expert) for expert in experts]
    addresses = [tensor.data_ptr() for tensor in (keys, ends, scratch)]
    module.trim_threshold(*addresses, flat_argument(base), inputs, counts, numel, 0)
    return Thresholds(keys, ends)


def assert_selected(module: ModuleType, base: Tensor, experts: list[Tensor], counts: list[int]) -> Thresholds:
    """Bit for bit what the reference selects."""
    found = select(module, base, experts, counts)
    expected = OPS["trim_threshold"].reference(base, experts, counts)
    assert_same("keys", found.keys, expected.keys)
    assert_same("ends", found.ends, expected.ends)
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
        emulated.trim_threshold(0, 0, 0, (0, DTYPE_CODES[torch.float32], 0), [], [], 2**32, 0)
