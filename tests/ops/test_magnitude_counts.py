"""magnitude_counts against NumPy's counts of the same keys, and the choice of a digit that follows from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.magnitude_counts import MagnitudeCounts, last_kept
from pymerge.testing.cases import LAYOUTS, implementations, task_case
from tests.helpers.arrays import assert_same_results, in_cpp, with_arrays
from tests.helpers.sparse import delta, weights

BACKENDS = ["reference", *[name for name, device in implementations("magnitude_counts") if device == "cpu"]]
DIGITS = [(15, 16), (0, 15), (20, 11), (0, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (63, 65), (300_000,)], ids=str)
@pytest.mark.parametrize(("shift", "bits"), DIGITS)
@pytest.mark.parametrize("with_base", [True, False])
def test_counts_of_a_digit(backend: str, shape: tuple[int, ...], shift: int, bits: int, with_base: bool) -> None:
    base, experts = weights(shape, torch.bfloat16, torch.bfloat16, torch.float32, ties=bits == 0)
    origin = base if with_base else torch.zeros_like(base)
    keys = [np.abs(delta(origin, expert)).view(np.int32).reshape(-1) for expert in experts]
    # The prefix of some element; none is left above the first digit.
    prefixes = [int(each[len(each) // 2] >> (shift + bits)) if len(each) else 0 for each in keys]
    found = Runner(backend)(MagnitudeCounts(base if with_base else None, experts, prefixes, shift, bits))
    assert found.dtype == np.int64
    for row, each, prefix in zip(found, keys, prefixes, strict=True):
        matching = each[each >> (shift + bits) == prefix] >> shift & ((1 << bits) - 1)
        np.testing.assert_array_equal(row, np.bincount(matching, minlength=1 << bits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize(("shift", "bits"), [(47, 16), (31, 16), (15, 16), (0, 15), (52, 11), (40, 12), (0, 0)])
def test_counts_of_float64_keys(backend: str, in_double: bool, shift: int, bits: int) -> None:
    """A task has the keys of its own deltas, or all have those of float64."""
    base, experts = weights((63, 65), torch.bfloat16, torch.bfloat16, torch.float64)
    experts[1] += 1e-12
    deltas = [delta(base, experts[0]), experts[1].numpy() - base.double().numpy()]
    if in_double:
        deltas[0] = deltas[0].astype(np.float64)
    keys = [np.abs(each).view(f"i{each.itemsize}").reshape(-1).astype(np.int64) for each in deltas]
    prefixes = [int(each[2000] >> (shift + bits)) for each in keys]
    op = MagnitudeCounts(base, experts, prefixes, shift, bits, in_double)
    found = Runner(backend)(op)
    for row, each, prefix in zip(found, keys, prefixes, strict=True):
        matching = each[each >> (shift + bits) == prefix] >> shift & ((1 << bits) - 1)
        np.testing.assert_array_equal(row, np.bincount(matching, minlength=1 << bits))
    for threads in (1, 3):
        assert_same_results(f"{threads}", in_cpp(with_arrays(op), threads), found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_starts_with_more_bits_than_it_has(backend: str) -> None:
    expert = torch.tensor([1.0, -1.5])
    one = int(expert.view(torch.int32)[0])
    for prefix in (one + (1 << 32), (1 << 62) + one, 1 << 31):
        assert Runner(backend)(MagnitudeCounts(None, [expert], [prefix], 0, 0)).tolist() == [[0]]
    assert Runner(backend)(MagnitudeCounts(None, [expert], [one], 0, 0)).tolist() == [[1]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shift", "bits"), DIGITS)
def test_layouts_threads_and_arrays_change_nothing(layout: str, shift: int, bits: int) -> None:
    case = task_case((300, 1111), [torch.bfloat16, torch.bfloat16, torch.float32], layout=layout)
    op = MagnitudeCounts(case.base, case.experts, [0, 0], shift, bits)
    expected = op.reference()
    for threads in (1, 2, 3):
        assert_same_results(layout, in_cpp(op, threads), expected)
        assert_same_results(layout, in_cpp(with_arrays(op), threads), expected)


def test_the_last_that_is_kept_is_looked_for_from_the_top() -> None:
    counts = np.array([4, 0, 3, 2, 0])
    # Value of the digit, how many are taken of it, and how many have it.
    expected = [(3, 1, 2), (3, 2, 2), (2, 1, 3), (2, 2, 3), (2, 3, 3), (0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 4, 4)]
    assert [last_kept(counts, left) for left in range(1, 10)] == expected


def test_what_does_not_fit_is_an_error() -> None:
    run, base = Runner("auto"), torch.zeros(4)
    with pytest.raises(ArgumentError, match="1 prefixes for 2 experts"):
        run(MagnitudeCounts(base, [base, base], [0], 0, 8))
    with pytest.raises(ArgumentError, match="a digit of 17 bits from bit 0 on; give 0 to 16 of the lower 63"):
        run(MagnitudeCounts(base, [base], [0], 0, 17))
