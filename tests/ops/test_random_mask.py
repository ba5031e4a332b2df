"""random_mask: ranks and random numbers, on every backend bit for bit, and its generator, Philox."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import as_tensor
from pymerge.common.shapes import key_of, row_bytes
from pymerge.errors import ArgumentError
from pymerge.ops._philox import philox, uniform_words
from pymerge.ops.random_mask import RandomMask
from pymerge.testing.cases import FLOATS, LAYOUTS, implementations, task_case
from pymerge.testing.compare import assert_same
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.oracles import della_probabilities
from tests.helpers.sparse import KEYS, SHAPES, SIZES, assert_masks, delta, flags, inputs, on_cpu, weights

RUNS = implementations("random_mask")
# Triton, which is slow where it is interpreted, is compared with the reference on smaller shapes.
BACKENDS = ["reference", *[name for name, device in RUNS if device == "cpu" and name != "triton"]]

# NaN and infinities pass through NumPy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("size", SIZES)
def test_backends_give_the_references_masks(backend: str, device: str, size: int) -> None:
    case, run = inputs(size, device), Runner(backend, device)
    for lowest, highest in (([0.0, 0.3, 1.0], [0.0, 0.3, 1.0]), ([0.5, 0.2, 2.0**-32], [0.5, 0.4, 2.0**-32])):
        for first in (0, 2**34 - 64):  # the second crosses a 32-bit number of counters
            expected = RandomMask(*on_cpu(case), lowest, highest, KEYS, first).reference()
            found = run(RandomMask(case.base, case.experts, lowest, highest, KEYS, first))
            assert_masks(f"{size} {lowest} {first}", found, expected)
    assert run.choices["random_mask"].backend == backend


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_masks_of_other_layouts_and_shapes(backend: str, device: str) -> None:
    run, packed, draws = Runner(backend, device), inputs(77, device), ([0.4] * 3, [0.4] * 3, KEYS)
    expected = run(RandomMask(packed.base, packed.experts, *draws))
    for layout, shape in zip(LAYOUTS, [(1, 77), (7, 11), (77,), (7, 1, 11)], strict=True):
        case = inputs(77, device, layout)
        base, experts = case.base.reshape(shape), [expert.reshape(shape) for expert in case.experts]
        assert_masks(f"{layout} {shape}", run(RandomMask(base, experts, *draws)), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_what_is_not_finite_stays_in_the_norms(backend: str, device: str) -> None:
    base = torch.zeros(5, device=device)
    expert = torch.tensor([math.nan, math.inf, -math.inf, 2.0, 0.0], device=device)
    masks = Runner(backend, device)(RandomMask(base, [expert], [0.5], [0.5], [7]))
    assert math.isnan(masks.before[0])
    assert math.isnan(masks.after[0])


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_words_beyond_the_first_32_bits_of_the_key_count(backend: str, device: str) -> None:
    """Keys that differ in one half only give other masks."""
    run, base = Runner(backend, device), torch.zeros(256, device=device)
    masks = [run(RandomMask(base, [base], [0.5], [0.5], [key])).bits for key in (5, 5 + 2**32, 6)]
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(masks, 2))


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *RUNS])
def test_masks_are_the_same_without_norms(backend: str, device: str) -> None:
    case, run = inputs(2111, device), Runner(backend, device)
    draws = [0.0, 0.3, 0.5], [0.0, 0.4, 0.5], KEYS, 64
    for experts in (slice(0, 1), slice(0, 3)):
        arguments = case.base, case.experts[experts], *(each[experts] for each in draws[:3]), 64
        with_norms, without = (run(RandomMask(*arguments, norms=norms)) for norms in (True, False))
        assert_same(f"{experts}", as_tensor(without.bits), as_tensor(with_norms.bits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranked", [False, True])
def test_arrays_give_the_same_bits(shape: tuple[int, ...], ranked: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.float16, torch.float32, ties=True)
    op = RandomMask(base, experts, [0.3, 0.2], [0.3, 0.6] if ranked else [0.3, 0.2], KEYS[:2], 128)
    run = Runner("native")
    assert_same_results(str(shape), run(with_arrays(op)), run(op))


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 7), (70, 901), (2, 40_000)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_float64_beside_other_dtypes(shape: tuple[int, ...], ties: bool) -> None:
    """Ranks of each task in its own precision."""
    base, experts = weights(shape, torch.bfloat16, torch.float64, torch.bfloat16, torch.float64, ties=ties)
    if not ties:  # equal in float32, in an order of their own in float64
        order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(2))
        experts[2] = base.double() + 1.0 + 2.0**-40 * order.view(shape)
    for lowest, highest in (([0.3] * 3, [0.3] * 3), ([0.2, 0.0, 0.1], [0.6, 1.0, 0.9])):
        op = RandomMask(base, experts, lowest, highest, KEYS, 64)
        expected = op.reference()
        for threads in (1, 3):
            assert_masks(f"{threads}", in_cpp(op, threads), expected)
            assert_same_results(f"{threads}", in_cpp(with_arrays(op), threads), in_cpp(op, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_float64_has_the_largest_rank(backend: str) -> None:
    expert = torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0], dtype=torch.float64)
    ranked = Runner(backend)(RandomMask(torch.zeros(5), [expert], [0.0], [1.0], [7]))
    assert flags(ranked, (5,))[0][1]
    assert not flags(ranked, (5,))[0][4]
    assert math.isnan(ranked.before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_has_the_largest_rank(backend: str) -> None:
    base, expert = torch.zeros(5), torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0])
    ranked = Runner(backend)(RandomMask(base, [expert], [0.0], [1.0], [7]))
    assert flags(ranked, (5,))[0][1]  # the largest is kept always, the smallest never
    assert not flags(ranked, (5,))[0][4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_thread_counts_change_no_bit(layout: str) -> None:
    case = task_case((300, 1111), [torch.bfloat16, torch.bfloat16, torch.float32], layout=layout)
    packed = case.to(torch.float32)
    found = [
        in_cpp(RandomMask(base, experts, [0.2, 0.5], [0.4, 0.5], KEYS[:2]), threads)
        for base, experts in ((case.base, case.experts), (packed.base, packed.experts))
        for threads in (1, 2, 3)
    ]
    for other in found[1:]:
        assert_same_results(layout, other, found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_random_masks_follow_probability_and_generator(backend: str, shape: tuple[int, ...], ties: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, ties=ties)
    lowest, highest = [0.25, 0.1, 0.0], [0.25, 0.4, 1.0]
    numel = math.prod(shape)
    masks = Runner(backend)(RandomMask(base, experts, lowest, highest, KEYS))
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
        op = RandomMask(base, experts, lowest, highest, KEYS)
        assert_masks(f"{lowest}", Runner("native")(op), op.reference())


def test_random_masks_keep_as_many_as_they_should() -> None:
    """Six standard deviations of a binomial distribution, for all elements and for the smallest and largest quarter."""
    base, experts = weights((1000, 1000), torch.float32, torch.float32)
    for low, high in ((0.1, 0.1), (0.9, 0.9), (0.35, 0.65)):
        masks = Runner("native")(RandomMask(base, experts, [low], [high], [key_of(0, "w", 0)]))
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


def test_philox_gives_arrays_the_numbers_of_tensors() -> None:
    begin, end = 2**34 - 8, 2**34 + 21  # where the counter's second word begins
    found = uniform_words(KEYS[0], begin, end)
    assert found.shape == (end - begin,)
    assert found.tolist() == uniform_words(KEYS[0], begin, end, torch.device("cpu")).tolist()


def test_keys_differ_by_seed_name_and_model() -> None:
    keys = {key_of(seed, name, model) for seed in (0, 1, 11) for name in ("a", "b") for model in (0, 1, 11)}
    assert len(keys) == 18
    assert all(0 <= key < 2**64 for key in keys)


def test_what_does_not_fit_is_an_error() -> None:
    run, base = Runner("auto"), torch.zeros(4)
    with pytest.raises(ArgumentError, match=r"probabilities 0.6 to 0.4; give 0 <= lowest <= highest <= 1"):
        run(RandomMask(base, [base], [0.6], [0.4], [1]))
    with pytest.raises(ArgumentError, match="key -1 is not one of 64 bits"):
        run(RandomMask(base, [base], [0.4], [0.6], [-1]))


def test_scratch_is_for_the_rows_that_are_ranked_at_once() -> None:
    assert RandomMask.scratch((1000, 70), 3, native=True) == 40 * 70
    assert RandomMask.scratch((1000, 70), 3, native=False) == 40 * 70 * 32
    assert RandomMask.scratch((10_000, 70), 3, native=False) == 40 * 70 * 64
    assert RandomMask.scratch((0, 70), 3, native=False) == 0


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
        op = RandomMask(base, [expert], [lowest], [highest], [7], 64)
        assert torch.equal(Runner("native")(op).bits, op.reference().bits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranked", [False, True])
def test_masks_of_rows_are_those_of_the_whole(backend: str, ranked: bool) -> None:
    base, experts = weights((640, 33), torch.bfloat16, torch.bfloat16, torch.float32)
    run, probabilities = Runner(backend), ([0.3, 0.2], [0.7, 0.6]) if ranked else ([0.4] * 2, [0.4] * 2)
    whole = run(RandomMask(base, experts, *probabilities, KEYS[:2]))
    for start in (0, 192, 448):
        part = slice(start, start + 192)
        parts = [each[part] for each in experts]
        found = run(RandomMask(base[part], parts, *probabilities, KEYS[:2], start * 33))
        for mask, expected in zip(flags(found, (192, 33)), flags(whole, (640, 33)), strict=True):
            np.testing.assert_array_equal(mask, expected[part])
    with pytest.raises(ArgumentError, match="first element is number 33; give a multiple of 64"):
        run(RandomMask(base, experts, *probabilities, KEYS[:2], 33))
