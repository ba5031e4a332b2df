"""cover_sum (DC-Merge) against the published form in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.cover_sum import CoverSum, Smoothing
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import dc_delta

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one task.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("share", [1e-3, 0.05, 1.0])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, share: float) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    expected = dc_delta(as_float64(base), [as_float64(expert) for expert in experts], share)
    found = CoverSum(base, experts, core_share=share).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(as_float64(found), expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("smoothing", ["avg", "linear"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_a_rank_of_its_own_and_smoothed_singular_values(smoothing: Smoothing, rank: int, share: float) -> None:
    base, experts = make_weights(20, 14, 4, dtype=torch.float64)
    expected = dc_delta(as_float64(base), [as_float64(expert) for expert in experts], share, rank, smoothing)
    found = CoverSum(base, experts, rank, smoothing, share).reference()
    assert relative_error(as_float64(found), expected) < 1e-9


def test_tasks_in_different_directions_are_summed() -> None:
    """U and V disjoint: the cores are diagonal, each in its own block."""
    generator = torch.Generator().manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0] for _ in "UV")
    s = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
    taus = [U[:, 3 * t : 3 * t + 3] * s @ V[:, 3 * t : 3 * t + 3].mT for t in range(4)]
    base = torch.zeros(12, 12, dtype=torch.float64)
    found = CoverSum(base, taus, core_share=3 / 144).reference()
    torch.testing.assert_close(found, sum(taus), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    expected = CoverSum(base, experts, core_share=0.2).reference()
    laid = [lay_out(expert, layout) for expert in experts]
    found = CoverSum(lay_out(base, layout), laid, core_share=0.2).reference()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_equal_tasks_and_fewer_directions_than_tasks() -> None:
    """Directions that tasks share are halved, as in the published form, which adds arbitrary ones to them."""
    base, experts = make_weights(16, 12, 1, dtype=torch.float64)
    P, s, Qh = np.linalg.svd(as_float64(experts[0] - base))
    found = CoverSum(base, experts * 2, core_share=1.0).reference()
    assert relative_error(as_float64(found), P[:, :6] * s[:6] @ Qh[:6] / 2) < 1e-9
    base, experts = make_weights(1, 8, 3, dtype=torch.float64)
    assert CoverSum(base, experts, core_share=1.0).reference().any()


def test_nothing_is_left_of_deltas_of_zero_and_of_no_elements() -> None:
    base = torch.ones(6, 4)
    assert not CoverSum(base, [base, base]).reference().any()
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", CoverSum(empty, [empty + 1, empty]).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), CoverSum(base, experts)
    assert_same("X", run(op), op.reference())
    assert run.choices["cover_sum"].backend == "reference"
    assert_same("arrays", run(CoverSum(Array.of(base), [Array.of(e) for e in experts])), op.reference())


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(6, 4)
    with pytest.raises(ArgumentError, match=r"cover_sum: the base has shape \(4,\), expected 2 dimensions"):
        CoverSum(torch.zeros(4), [torch.zeros(4)]).check()
    for share in (0.0, 1.5):
        with pytest.raises(ArgumentError, match=r"cover_sum: core_share is .*; give a share above 0 up to 1"):
            CoverSum(base, [base], core_share=share).check()
    with pytest.raises(ArgumentError, match=r"3 directions of each of 2 tasks are more than the 4 .*give rank 2 or"):
        CoverSum(base, [base, base], 3).check()
    with pytest.raises(ArgumentError, match=r"5 tasks are more than the 4 directions .*exclude it"):
        CoverSum(base, [base] * 5, 1).check()
