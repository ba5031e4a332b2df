"""Selection by magnitude, found at once or counted piece by piece: the same elements, of equal ones the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array, as_tensor
from pymerge.methods.rows import Rows
from pymerge.methods.selection import Magnitudes, Selection, digits, in_float32, passes_to_select
from pymerge.ops._bitmask import unpack
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.trim_threshold import TrimThreshold
from tests.helpers.oracles import kept_magnitudes


def pieces_of(rows: Rows, ends: list[int]) -> list[Rows]:
    return [rows.cut(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def count_all(selection: Selection, run: Any, pieces: list[Magnitudes], passes: int) -> None:
    for _ in range(passes):
        for piece in pieces:
            selection.add(piece.first, selection.count(run, piece))
        selection.end_pass()


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize("kind", ["reference", "native", "arrays"])
@pytest.mark.parametrize("count", [0, 1, 700, 1500, 2999, 3000])
def test_by_pieces_the_elements_of_the_whole(kind: str, count: int, of_model: bool) -> None:
    """Magnitudes of five values: the last one that is taken is in many elements, of several pieces."""
    run = Runner("native" if kind == "arrays" else kind)
    generator = torch.Generator().manual_seed(count)
    base = torch.zeros(3000)
    experts = [torch.randint(-4, 5, (3000,), generator=generator) / 8 for _ in range(2)]
    counts = [count, 1000]
    thresholds = run(TrimThreshold(base, experts, counts))
    whole = as_tensor(run(MagnitudeMask(base, experts, thresholds)).bits)
    everything = Rows(base, experts, "F32")
    if kind == "arrays":
        everything = Rows(Array.of(base), [Array.of(expert) for expert in experts], "F32")
    pieces = pieces_of(everything, [512, 1024, 2944, 3000])
    selection = Selection(3000, counts, of_model=of_model)
    passes = passes_to_select(3000, counts, of_model=of_model)
    count_all(selection, run, [Magnitudes.of(piece) for piece in pieces], passes)
    bits = [
        as_tensor(run(MagnitudeMask(piece.base, piece.experts, selection.of_piece(run, Magnitudes.of(piece)))).bits)
        for piece in pieces
    ]
    assert torch.equal(torch.cat(bits, dim=1)[:, : whole.shape[1]], whole)
    assert int(sum(byte.bit_count() for byte in whole[0].tolist())) == count
    found = Selection(3000, counts)
    found.find(run, Magnitudes.of(everything))
    at_once = found.of_piece(run, Magnitudes.of(everything))
    assert np.array_equal(at_once.keys, thresholds.keys)
    assert np.array_equal(at_once.ends, thresholds.ends)


@pytest.mark.parametrize("ends", [[0, 0, 512, 512, 3000], [64, 3000, 3000], [0, 3000]], ids=str)
@pytest.mark.parametrize("kind", ["reference", "native"])
def test_pieces_without_elements(kind: str, ends: list[int]) -> None:
    """Of a model that has empty tensors: they take none, wherever the last element is."""
    run = Runner(kind)
    generator = torch.Generator().manual_seed(1)
    experts = [torch.randint(-2, 3, (3000,), generator=generator) / 8]
    pieces = pieces_of(Rows(torch.zeros(3000), experts, "F32"), ends)
    selection = Selection(3000, [1000], of_model=True)
    count_all(selection, run, [Magnitudes.of(piece) for piece in pieces], passes_to_select(3000, [1000], of_model=True))
    taken = 0
    for piece in pieces:
        masks = run(MagnitudeMask(piece.base, piece.experts, selection.of_piece(run, Magnitudes.of(piece))))
        taken += int(sum(byte.bit_count() for byte in as_tensor(masks.bits)[0].tolist()))
    assert taken == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_ranks_are_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    values: Tensor = torch.rand(5000, generator=generator, dtype=dtype).square_()
    values[::3] = values[0]
    values[7], values[8], values[9] = 0.0, 3e-39, 1e30
    ordered = values.sort().values
    ranks = (0, 1, 2, 1200, 2500, 3333, 4998, 4999)
    double = dtype == torch.float64
    counts = [len(values) - rank for rank in ranks]
    selection = Selection(len(values), counts, keys_only=True, double=double)
    pieces = pieces_of(Rows(values, [values], "F32"), [1700, 3400, 5000])
    scores = [Magnitudes.scores(piece.base, piece, len(ranks)) for piece in pieces]
    count_all(selection, Runner(), scores, len(digits(double)))
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.tensor(selection.keys).to(integer).view(dtype).tolist() == ordered[list(ranks)].tolist()


WIDE = {"double": True, "of_model": True}


@pytest.mark.parametrize("kind", ["reference", "native", "arrays"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 700, 1500, 2999])
def test_tensors_of_several_dtypes_as_one_vector(kind: str, ties: bool, count: int) -> None:
    """Elements of float32 and of float64 deltas compared with each other: those of all in float64."""
    run = Runner("native" if kind == "arrays" else kind)
    generator = torch.Generator().manual_seed(count)
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float64, torch.float16]
    experts = [
        torch.randint(-4, 5, (600,), generator=generator).double() / 8
        if ties
        else torch.randn(600, generator=generator, dtype=torch.float64)
        for _ in dtypes
    ]
    experts = [expert.to(dtype) for expert, dtype in zip(experts, dtypes, strict=True)]
    expected = kept_magnitudes(torch.cat([expert.double() for expert in experts]).numpy(), 0, count)
    pieces = []
    for number, expert in enumerate(experts):
        base = torch.zeros(600, dtype=torch.bfloat16)
        rows = Rows(base, [expert], "F32", 600 * number)
        pieces.append(Rows(Array.of(base), [Array.of(expert)], "F32", 600 * number) if kind == "arrays" else rows)
    selection = Selection(3000, [count], **WIDE)
    count_all(selection, run, [Magnitudes.of(piece) for piece in pieces], passes_to_select(3000, [count], **WIDE))
    found = []
    for piece in pieces:
        thresholds = selection.of_piece(run, Magnitudes.of(piece))
        bits = as_tensor(run(MagnitudeMask(piece.base, piece.experts, thresholds)).bits)
        found.append(unpack(bits[0], 0, 600).numpy())
    np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("count", [0, 3000])
def test_nothing_and_everything_of_several_dtypes(count: int) -> None:
    run, selection = Runner("native"), Selection(3000, [count], **WIDE)
    assert passes_to_select(3000, [count], **WIDE) == 0
    for dtype in (torch.float32, torch.float64):
        expert = torch.randn(3000, dtype=dtype).index_fill_(0, torch.tensor([5]), float("nan"))
        rows = Rows(torch.zeros(3000), [expert], "F32")
        masks = run(MagnitudeMask(rows.base, rows.experts, selection.of_piece(run, Magnitudes.of(rows))))
        assert int(unpack(as_tensor(masks.bits)[0], 0, 3000).sum()) == count


def test_keys_of_float64_in_float32() -> None:
    """The largest float32 that is not larger, and whether it is the same number."""

    def key(number: float) -> int:
        return int(np.array(number).view(np.int64))

    numbers = [0.0, 1.0, 0.1, 1e-45, 1e-46, 3e-39, 2.0**-126, 3.5e38, 3.4028234663852886e38, 1e300, 5e-324, np.inf]
    for number in numbers:
        found, same = in_float32(key(number))
        value = float(np.array(found, np.int32).view(np.float32))
        assert value <= number
        assert same == (value == number)
        if not np.isinf(number):
            assert float(np.array(found + 1, np.int32).view(np.float32)) > number
    assert in_float32(key(np.nan)) == (int(np.float32(np.nan).view(np.int32)), True)
    assert in_float32(key(1e300))[0] == in_float32(key(np.inf))[0] - 1
