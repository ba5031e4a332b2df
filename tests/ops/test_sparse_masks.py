"""Masks of task vectors: exact selection, ties, ranks and random numbers, in PyTorch and in C++ bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner, load
from pymerge.common.shapes import NOTHING, key_of, row_bytes
from pymerge.errors import ArgumentError
from pymerge.ops import OPS
from pymerge.ops._bitmask import TaskMasks, unpack
from pymerge.ops._philox import philox, uniform_words
from pymerge.ops.trim_threshold import Thresholds
from pymerge.testing.cases import FLOATS, LAYOUTS, implementations, task_case
from pymerge.testing.compare import assert_same
from tests.helpers.oracles import della_probabilities, kept_magnitudes

BACKENDS = ["reference", *[name for name, device in implementations("trim_threshold") if device == "cpu"]]
# Empty, one element, one row, one column, words that are not full, rows of an odd length, several segments of a thread.
SHAPES = [(0, 5), (5, 0), (1,), (), (1, 70), (70, 1), (63, 65), (3, 4, 5), (40, 2000), (300_000,)]
KEYS = [1, 2**64 - 1, 12345678901234567]


def weights(
    shape: tuple[int, ...], *dtypes: torch.dtype, ties: bool = False, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts; with ties, of a handful of magnitudes with both signs, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        base = torch.zeros(shape)
        deltas = [torch.randint(-4, 5, shape, generator=generator) / 8 for _ in dtypes[1:]]
    else:
        base = 0.02 * torch.randn(shape, generator=generator)
        deltas = [5e-4 * torch.randn(shape, generator=generator) for _ in dtypes[1:]]
    experts = [(base + delta).to(dtype) for delta, dtype in zip(deltas, dtypes[1:], strict=True)]
    return base.to(dtypes[0]), experts


def flags(masks: TaskMasks, shape: tuple[int, ...]) -> list[np.ndarray]:
    return [unpack(bits, 0, math.prod(shape)).view(shape).numpy() for bits in masks.bits]


def delta(base: Tensor, expert: Tensor) -> np.ndarray:
    """tau in float32, as the ops form it."""
    return (expert.float() - base.float()).numpy()


def counts(numel: int) -> list[int]:
    return sorted({0, min(1, numel), numel // 3, numel // 2, max(0, numel - 1), numel})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_the_largest_are_kept(backend: str, shape: tuple[int, ...], ties: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, ties=ties)
    run_op, numel = Runner(backend), math.prod(shape)
    for many, few in itertools.product(counts(numel), repeat=2):
        if few > many:
            continue
        kept = run_op("trim_threshold", base, experts, [many, numel])
        dropped = run_op("trim_threshold", base, experts, [few, 0])
        masks = run_op("magnitude_mask", base, experts, kept, dropped)
        for mask, expert, (begin, end) in zip(flags(masks, shape), experts, [(few, many), (0, numel)], strict=True):
            np.testing.assert_array_equal(mask, kept_magnitudes(delta(base, expert), begin, end))


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=2)), ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_are_the_same_in_cpp(dtypes: tuple[torch.dtype, ...], ties: bool) -> None:
    base, experts = weights((600, 1000), *dtypes, dtypes[1], ties=ties)
    for count in (1, 1000, 300_000, 599_999):
        expected = OPS["trim_threshold"].reference(base, experts, [count, 600_000])
        found = Runner("native")("trim_threshold", base, experts, [count, 600_000])
        assert_same("keys", found.keys, expected.keys)
        assert_same("ends", found.ends, expected.ends)
        assert expected.ends[1] == 600_000


def test_a_threshold_says_how_many_ties_are_kept() -> None:
    base, expert = torch.zeros(6), torch.tensor([2.0, -1.0, 1.0, 0.5, 1.0, -3.0])
    one = int(torch.tensor(1.0).view(torch.int32))
    for backend in BACKENDS:
        found = [Runner(backend)("trim_threshold", base, [expert], [count]) for count in (0, 3, 4, 5, 6)]
        assert [int(each.keys[0]) for each in found] == [NOTHING, one, one, one, 0]
        assert [int(each.ends[0]) for each in found] == [0, 2, 3, 6, 6]  # 6: all of them


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_selected_in_float64(backend: str) -> None:
    base = torch.zeros(100, dtype=torch.float64)
    expert = 1.0 + 1e-12 * torch.randperm(100, generator=torch.Generator().manual_seed(0)).double()
    kept = Runner(backend)("trim_threshold", base, [expert], [10])
    masks = Runner(backend)("magnitude_mask", base, [expert], kept)
    np.testing.assert_array_equal(flags(masks, (100,))[0], kept_magnitudes(expert.numpy(), 0, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_the_largest_and_stays_in_the_norms(backend: str) -> None:
    base, expert = torch.zeros(5), torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0])
    run_op = Runner(backend)
    for count, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3])):
        masks = run_op("magnitude_mask", base, [expert], run_op("trim_threshold", base, [expert], [count]))
        assert np.flatnonzero(flags(masks, (5,))[0]).tolist() == expected
        assert math.isnan(float(masks.before[0]))
    ranked = run_op("random_mask", base, [expert], [0.0], [1.0], [7])
    assert flags(ranked, (5,))[0][1]  # the largest is kept always, the smallest never
    assert not flags(ranked, (5,))[0][4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_thread_counts_change_no_bit(layout: str) -> None:
    case = task_case((300, 1111), [torch.bfloat16, torch.bfloat16, torch.float32], layout=layout)
    packed = case.to(torch.float32)
    native = load("native").implementations()
    threads, found = torch.get_num_threads(), []
    for base, experts in ((case.base, case.experts), (packed.base, packed.experts)):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            kept = native["trim_threshold"](base, experts, [100_000, 1])
            drawn = native["random_mask"](base, experts, [0.2, 0.5], [0.4, 0.5], KEYS[:2])
            found.append([*kept, *native["magnitude_mask"](base, experts, kept), *drawn])
    torch.set_num_threads(threads)
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert_same(layout, second, first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_random_masks_follow_probability_and_generator(backend: str, shape: tuple[int, ...], ties: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, ties=ties)
    lowest, highest = [0.25, 0.1, 0.0], [0.25, 0.4, 1.0]
    numel = math.prod(shape)
    masks = Runner(backend)("random_mask", base, experts, lowest, highest, KEYS)
    assert masks.bits.shape == (3, row_bytes(numel))
    for t, mask in enumerate(flags(masks, shape)):
        words = uniform_words(KEYS[t], 0, numel, base.device).view(shape).numpy()
        middle, half = (lowest[t] + highest[t]) / 2, (highest[t] - lowest[t]) / 2
        probability = np.full(shape, middle)
        if half and numel and len(shape) and shape[-1] > 1:
            probability = della_probabilities(delta(base, experts[t]), middle, half)
        # Probabilities by another formula: within their rounding a number falls to either side.
        close = np.abs(words - probability * 2.0**32) <= 2
        np.testing.assert_array_equal(mask | close, (words < probability * 2.0**32) | close)
        tau = np.abs(delta(base, experts[t]).astype(np.float64))
        assert float(masks.before[t]) == pytest.approx(tau.sum(), rel=1e-12)
        assert float(masks.after[t]) == pytest.approx(tau[mask].sum(), rel=1e-12)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=2)), ids=str)
def test_random_masks_are_the_same_in_cpp(dtypes: tuple[torch.dtype, ...]) -> None:
    # Rows with few and with many ties, rows of zeros, and one element that is far larger than the rest.
    base, experts = weights((70, 1001), *dtypes, dtypes[1], dtypes[1])
    base[1] = experts[0][1] = 0.0
    experts[1][2, 5] = 1e4
    experts[2].copy_(base)
    for lowest, highest in (([0.3] * 3, [0.6] * 3), ([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])):
        expected = OPS["random_mask"].reference(base, experts, lowest, highest, KEYS)
        found = Runner("native")("random_mask", base, experts, lowest, highest, KEYS)
        assert_same("bits", found.bits, expected.bits)
        torch.testing.assert_close(found.before, expected.before, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.after, expected.after, rtol=1e-12, atol=0)


def test_random_masks_keep_as_many_as_they_should() -> None:
    """Six standard deviations of a binomial distribution, for all elements and for the smallest and largest quarter."""
    base, experts = weights((1000, 1000), torch.float32, torch.float32)
    for low, high in ((0.1, 0.1), (0.9, 0.9), (0.35, 0.65)):
        masks = Runner("native")("random_mask", base, experts, [low], [high], [key_of(0, "w", 0)])
        mask, tau = flags(masks, (1000, 1000))[0], np.abs(delta(base, experts[0]))
        order = np.argsort(tau, axis=1)
        for part, share in ((slice(None), 0.5), (slice(0, 250), 0.125), (slice(750, 1000), 0.875)):
            kept = np.take_along_axis(mask, order, axis=1)[:, part]
            expected = low + (high - low) * share
            assert abs(kept.mean() - expected) < 6 * math.sqrt(expected * (1 - expected) / kept.size) + 1e-3 * (
                high - low
            )


def test_philox_gives_the_known_answers() -> None:
    """The test vectors of Random123."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        found = philox(tuple(torch.tensor([word]) for word in counter), key)
        assert tuple(int(word) for word in found) == expected


def test_keys_differ_by_seed_name_and_model() -> None:
    keys = {key_of(seed, name, model) for seed in (0, 1, 11) for name in ("a", "b") for model in (0, 1, 11)}
    assert len(keys) == 18
    assert all(0 <= key < 2**64 for key in keys)


def test_what_does_not_fit_is_an_error() -> None:
    run_op, base = Runner("auto"), torch.zeros(4)
    with pytest.raises(ArgumentError, match="count 5 of 4 elements; give 0 to 4"):
        run_op("trim_threshold", base, [base], [5])
    with pytest.raises(ArgumentError, match="2 counts for 1 experts"):
        run_op("trim_threshold", base, [base], [1, 2])
    one = Thresholds(torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ArgumentError, match="1 thresholds for 2 experts; take them from trim_threshold"):
        run_op("magnitude_mask", base, [base, base], one)
    with pytest.raises(ArgumentError, match=r"probabilities 0.6 to 0.4; give 0 <= lowest <= highest <= 1"):
        run_op("random_mask", base, [base], [0.6], [0.4], [1])
    with pytest.raises(ArgumentError, match="key -1 is not one of 64 bits"):
        run_op("random_mask", base, [base], [0.4], [0.6], [-1])
    with pytest.raises(ArgumentError, match=r"torch.uint8 of shape \(1, 1\), expected uint8 of \(1, 8\)"):
        run_op("sparse_combine", base, [base], [1.0], bits=torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match=r"out_dtype torch\.int32 is not floating point"):
        run_op("sparse_combine", base, [base], [1.0], torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (63, 65), (300_000,)], ids=str)
@pytest.mark.parametrize(("shift", "bits"), [(15, 16), (0, 15), (20, 11), (0, 0)])
def test_counts_of_a_digit(backend: str, shape: tuple[int, ...], shift: int, bits: int) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, ties=bits == 0)
    keys = [np.abs(delta(base, expert)).view(np.int32).reshape(-1) for expert in experts]
    # The prefix of some element; none is left above the first digit.
    prefixes = [int(each[len(each) // 2] >> (shift + bits)) if len(each) else 0 for each in keys]
    found = Runner(backend)("magnitude_counts", base, experts, prefixes, shift, bits)
    for row, each, prefix in zip(found, keys, prefixes, strict=True):
        matching = each[each >> (shift + bits) == prefix] >> shift & ((1 << bits) - 1)
        np.testing.assert_array_equal(row.numpy(), np.bincount(matching, minlength=1 << bits))


def uneven_rows(kind: str, columns: int) -> tuple[Tensor, Tensor]:
    """A base and an expert whose magnitudes are hard to rank."""
    generator = torch.Generator().manual_seed(columns)
    base = 0.02 * torch.randn((5, columns), generator=generator)
    change = 1e-3 * torch.randn(base.shape, generator=generator)
    if kind == "bfloat16":  # few magnitudes, each many times
        return base.bfloat16(), (base + 0.1 * change).bfloat16()
    if kind == "zeros":
        change *= torch.rand(base.shape, generator=generator) < 0.1
    elif kind == "outlier":  # all others are less than a thousandth of it
        change[:, columns // 2] = 1e3
    elif kind == "shift":  # all about equal
        change = torch.full(base.shape, 1e-3)
    elif kind == "not finite":
        change[:, 0], change[:, -1] = math.inf, math.nan
    return base, base + change


@pytest.mark.parametrize("columns", [2, 31, 33, 70, 1000, 8192, 70_000])
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "zeros", "outlier", "shift", "not finite"])
def test_draws_by_rank_are_those_of_the_reference(kind: str, columns: int) -> None:
    base, expert = uneven_rows(kind, columns)
    # The last ones are open for all elements, for few, and for none.
    for lowest, highest in ((0.35, 0.65), (0.0, 1.0), (0.5, 0.5001), (0.0, 0.0), (1.0, 1.0), (0.2, 1.0)):
        found = Runner("native")("random_mask", base, [expert], [lowest], [highest], [7], 64)
        expected = OPS["random_mask"].reference(base, [expert], [lowest], [highest], [7], 64)
        assert torch.equal(found.bits, expected.bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranked", [False, True])
def test_masks_of_rows_are_those_of_the_whole(backend: str, ranked: bool) -> None:
    base, experts = weights((640, 33), torch.bfloat16, torch.bfloat16, torch.float32)
    run_op, probabilities = Runner(backend), ([0.3, 0.2], [0.7, 0.6]) if ranked else ([0.4] * 2, [0.4] * 2)
    whole = run_op("random_mask", base, experts, *probabilities, KEYS[:2])
    for start in (0, 192, 448):
        part = slice(start, start + 192)
        found = run_op(
            "random_mask", base[part], [each[part] for each in experts], *probabilities, KEYS[:2], start * 33
        )
        for mask, expected in zip(flags(found, (192, 33)), flags(whole, (640, 33)), strict=True):
            np.testing.assert_array_equal(mask, expected[part])
    with pytest.raises(ArgumentError, match="first element is number 33; give a multiple of 64"):
        run_op("random_mask", base, experts, *probabilities, KEYS[:2], 33)
