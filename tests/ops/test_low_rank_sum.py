"""low_rank_sum against float64: rows, columns and ranks around the tiles, dtypes; the same bits in any rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.low_rank_sum import LowRankSum, Panels
from pymerge.testing.cases import FLOATS, implementations
from pymerge.testing.compare import assert_same

RUNS = implementations("low_rank_sum")
# Rows around a tile's and a chunk's, columns around a tile's and a block's, ranks around what fits a cache.
SIZES = ((0, 5, 3), (5, 0, 3), (1, 1, 1), (7, 33, 0), (13, 70, 5), (85, 1030, 17), (90, 517, 300))


def case(rows: int, columns: int, rank: int, base: torch.dtype, factors: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + rank)
    sizes = ((rows, columns), (rows, rank), (rank, columns))
    W, L, R = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return W.to(base), L.to(factors), R.to(factors)


def exact(W: Tensor, L: Tensor, R: Tensor, scale: float) -> Tensor:
    return W.double() + scale * (L.double() @ R.double())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_sum(backend: str, device: str, size: tuple[int, int, int]) -> None:
    run = Runner(backend, device)
    for base, out in itertools.product(FLOATS, FLOATS):
        W, L, R = case(*size, base, torch.float32)
        found = run(LowRankSum(*(each.to(device) for each in (W, L, R)), 0.7, out_dtype=str(out)))
        assert found.dtype == out
        expected = exact(W, L, R, 0.7)
        rounding = torch.finfo(out).eps / 2 * expected.abs() + 3e-7 * (1 + size[2]) + 1e-7 * (out == torch.float16)
        assert bool(((found.cpu().double() - expected).abs() <= rounding).all())
    W, L, R = case(*size, torch.float64, torch.float64)
    found = run(LowRankSum(*(each.to(device) for each in (W, L, R))))
    torch.testing.assert_close(found.cpu(), exact(W, L, R, 1.0), rtol=1e-13, atol=1e-13)
    assert run.choices["low_rank_sum"].backend == backend


@given(rows=st.integers(1, 200), columns=st.integers(1, 1100), rank=st.integers(0, 70), data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_rows_have_the_bits_that_they_have_in_the_whole(
    rows: int, columns: int, rank: int, data: st.DataObject
) -> None:
    run = Runner("native")
    W, L, R = case(rows, columns, rank, torch.bfloat16, torch.float32)
    whole = run(LowRankSum(W, L, R, 0.7, out_dtype="F32"))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = run(LowRankSum(W[start:stop], L[start:stop], R, 0.7, out_dtype="F32"))
    assert part.numpy().tobytes() == whole[start:stop].numpy().tobytes()


def test_the_number_of_threads_changes_no_bit() -> None:
    W, L, R = case(301, 1555, 40, torch.bfloat16, torch.float32)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        try:
            found.append(Runner("native")(LowRankSum(W, L, R, out_dtype="F32")))
        finally:
            torch.set_num_threads(threads)
    assert_same("2 threads", found[1], found[0])
    assert_same("5 threads", found[2], found[0])


def test_arrays_give_what_tensors_give() -> None:
    W, L, R = case(40, 70, 9, torch.float32, torch.float32)
    out = np.empty((40, 70), np.float32)
    found = Runner("native")(LowRankSum(Array.of(W), Array.of(L), Array.of(R), 2.0, out=Array.of(out)))
    assert isinstance(found, Array)
    assert torch.equal(torch.from_numpy(out), Runner("native")(LowRankSum(W, L, R, 2.0)))


@pytest.mark.parametrize("code", ["F32", "F64"])
@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 200])
def test_a_right_factor_in_panels_is_laid_out_once(columns: int, code: str) -> None:
    """By rows, as factors are read one above the other, or by columns."""
    kind = torch.float32 if code == "F32" else torch.float64
    W, L, R = case(40, columns, 9, kind, kind)
    matrix = R.double().numpy()
    by_rows = Panels.stacked(9, columns, code, [matrix[:4], matrix[4:4], matrix[4:]])
    by_columns = Panels(9, columns, code)
    for first in range(0, columns, 64):
        by_columns.put_columns(first, matrix[:, first : first + 64])
    for panels in (by_rows, by_columns):
        assert (panels.shape, panels.dtype) == ((9, columns), code)
        np.testing.assert_array_equal(panels.matrix(), R.numpy())
        for backend in ("native", "reference"):
            assert_same(backend, Runner(backend)(LowRankSum(W, L, panels)), Runner(backend)(LowRankSum(W, L, R)))
    with pytest.raises(ArgumentError, match="R has shape"):
        Runner("native")(LowRankSum(W[:, 1:].contiguous() if columns else torch.zeros(40, 1), L, by_rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    W, L, R = case(20, 40, 3, torch.float32, torch.float32)
    R[1, 30] = value
    found = Runner("native")(LowRankSum(W, L, R))
    assert not bool(found[:, 30].isfinite().any())
    assert bool(found[:, :30].isfinite().all())


def test_arguments_that_do_not_fit() -> None:
    W, L, R = case(4, 6, 2, torch.float32, torch.float32)
    wrong = [
        (LowRankSum(W[0], L, R), "expected matrices"),
        (LowRankSum(W, L[:3], R), "L has shape"),
        (LowRankSum(W, L, R[:1]), "R has shape"),
        (LowRankSum(W, L.double(), R), "both in float32"),
        (LowRankSum(W, L, R, out_dtype="F64"), "in float64"),
        (LowRankSum(W.double(), L, R), "in float64"),
        (LowRankSum(W, L, R.mT.contiguous().mT), "contiguous"),
        (LowRankSum(W, L, R, out=torch.empty(3, 6)), "out is"),
        (LowRankSum(W, L, R, out=W), "memory of an input"),
    ]
    for op, text in wrong:
        with pytest.raises(ArgumentError, match=text):
            Runner("native")(op)
