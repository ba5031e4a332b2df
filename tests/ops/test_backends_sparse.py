"""Thresholds and masks on every compiled backend: integers decide, so all agree bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import load
from pymerge.ops import OPS
from pymerge.ops._bitmask import TaskMasks
from pymerge.testing.cases import FLOATS, LAYOUTS, TaskCase, implementations, task_case
from pymerge.testing.compare import assert_same

KEYS = [1, 2**64 - 1, 12345678901234567]
# Nothing; one element; words of 32 that are not full; a row of words that is not; blocks of 1024 with a tail.
SIZES = (0, 1, 31, 65, 1024, 2111)

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def inputs(size: int, device: str = "cpu", layout: str = "contiguous", ties: bool = False) -> TaskCase:
    """A base in bfloat16 and three experts, one of each dtype; with ties, of a handful of magnitudes."""
    case = task_case((1, size), [torch.bfloat16, *FLOATS], layout=layout)
    if ties:
        generator = torch.Generator().manual_seed(size)
        for tensor in (case.base, *case.experts):
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator) / 8)
    return TaskCase(case.base.to(device), [expert.to(device) for expert in case.experts])


def assert_masks(label: str, found: TaskMasks, expected: TaskMasks) -> None:
    assert_same(f"{label}: bits", found.bits, expected.bits)
    for name in ("before", "after"):
        norms = getattr(found, name).cpu(), getattr(expected, name).cpu()
        torch.testing.assert_close(*norms, rtol=1e-13, atol=0, equal_nan=True)


def on_cpu(case: TaskCase) -> tuple[Tensor, list[Tensor]]:
    return case.base.cpu(), [expert.cpu() for expert in case.experts]


@pytest.mark.parametrize(("backend", "device"), implementations("trim_threshold"))
@pytest.mark.parametrize("ties", [False, True])
def test_trim_threshold(backend: str, device: str, ties: bool) -> None:
    function = load(backend).implementations()["trim_threshold"]
    for size in (*SIZES, 70_001):
        case = inputs(size, device, ties=ties)
        for share in (0.0, 0.1, 0.5, 0.9999):
            counts = [int(share * size), size, min(1, size)]
            expected = OPS["trim_threshold"].reference(*on_cpu(case), counts)
            for name, mine, theirs in zip(
                ("keys", "ends"), function(case.base, case.experts, counts), expected, strict=True
            ):
                assert_same(f"{name} of {counts}", mine, theirs)


@pytest.mark.parametrize(("backend", "device"), implementations("magnitude_mask"))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_magnitude_mask(backend: str, device: str, size: int, ties: bool) -> None:
    function = load(backend).implementations()["magnitude_mask"]
    case = inputs(size, device, ties=ties)
    trim, reference = OPS["trim_threshold"].reference, OPS["magnitude_mask"].reference
    kept = trim(case.base, case.experts, [size // 2, size, 0])
    for dropped in (None, trim(case.base, case.experts, [size // 5, min(1, size), 0])):
        expected = reference(case.base, case.experts, kept, dropped)
        assert_masks(f"{size}", function(case.base, case.experts, kept, dropped), expected)


@pytest.mark.parametrize(("backend", "device"), implementations("random_mask"))
@pytest.mark.parametrize("size", SIZES)
def test_random_mask(backend: str, device: str, size: int) -> None:
    function = load(backend).implementations()["random_mask"]
    case = inputs(size, device)
    for lowest, highest in (([0.0, 0.3, 1.0], [0.0, 0.3, 1.0]), ([0.5, 0.2, 2.0**-32], [0.5, 0.4, 2.0**-32])):
        for first in (0, 2**34 - 64):  # the second crosses a 32-bit number of counters
            expected = OPS["random_mask"].reference(*on_cpu(case), lowest, highest, KEYS, first)
            found = function(case.base, case.experts, lowest, highest, KEYS, first)
            assert_masks(f"{size} {lowest} {first}", found, expected)


@pytest.mark.parametrize(("backend", "device"), implementations("random_mask"))
def test_masks_of_other_layouts_and_shapes(backend: str, device: str) -> None:
    functions = load(backend).implementations()
    kept = OPS["trim_threshold"].reference(*on_cpu(inputs(77)), [30, 20, 10])
    kept = type(kept)(*(each.to(device) for each in kept))
    packed = inputs(77, device)
    for layout, shape in zip(LAYOUTS, [(1, 77), (7, 11), (77,), (7, 1, 11)], strict=True):
        case = inputs(77, device, layout)
        base, experts = case.base.reshape(shape), [expert.reshape(shape) for expert in case.experts]
        for name, arguments in (("magnitude_mask", (kept,)), ("random_mask", ([0.4] * 3, [0.4] * 3, KEYS))):
            expected = functions[name](packed.base, packed.experts, *arguments)
            assert_masks(f"{name} {layout} {shape}", functions[name](base, experts, *arguments), expected)


@pytest.mark.parametrize(("backend", "device"), implementations("random_mask"))
def test_what_is_not_finite_stays_in_the_norms(backend: str, device: str) -> None:
    functions = load(backend).implementations()
    base, expert = torch.zeros(5, device=device), torch.tensor([1.0, math.inf, -math.inf, 2.0, 0.0], device=device)
    for count, infinite in ((1, True), (0, False)):
        kept = OPS["trim_threshold"].reference(base, [expert], [count])
        expected = OPS["magnitude_mask"].reference(base, [expert], kept)
        found = functions["magnitude_mask"](base, [expert], kept)
        assert_masks(f"{count}", found, expected)
        assert math.isinf(float(found.before[0]))
        assert math.isnan(float(found.after[0]))  # what is left out is multiplied by 0
        assert bool(found.bits.any()) == infinite
    expert[0] = math.nan
    masks = functions["random_mask"](base, [expert], [0.5], [0.5], [7])
    assert math.isnan(float(masks.before[0]))
    assert math.isnan(float(masks.after[0]))


@pytest.mark.parametrize(("backend", "device"), implementations("random_mask"))
def test_words_beyond_the_first_32_bits_of_the_key_count(backend: str, device: str) -> None:
    """Keys that differ in one half only give other masks."""
    function = load(backend).implementations()["random_mask"]
    base = torch.zeros(256, device=device)
    masks = [function(base, [base], [0.5], [0.5], [key]).bits for key in (5, 5 + 2**32, 6)]
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(masks, 2))
