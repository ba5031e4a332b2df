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
from pymerge.methods.selection import Magnitudes, Selection, digits, passes_to_select
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.trim_threshold import TrimThreshold


def pieces_of(rows: Rows, ends: list[int]) -> list[Rows]:
    return [rows.cut(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def count_all(selection: Selection, run: Any, pieces: list[Magnitudes], passes: int) -> None:
    for _ in range(passes):
        for piece in pieces:
            selection.add(piece.first, selection.count(run, piece))
        selection.end_pass()


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("kind", ["reference", "native", "arrays"])
@pytest.mark.parametrize("count", [0, 1, 700, 1500, 2999, 3000])
def test_by_pieces_the_elements_of_the_whole(kind: str, count: int, frugal: bool) -> None:
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
    selection = Selection(3000, counts, frugal=frugal)
    count_all(selection, run, [Magnitudes.of(piece) for piece in pieces], passes_to_select(3000, counts, frugal=frugal))
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
    selection = Selection(3000, [1000], frugal=True)
    count_all(selection, run, [Magnitudes.of(piece) for piece in pieces], passes_to_select(3000, [1000], frugal=True))
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
    bits = 31 if dtype == torch.float32 else 63
    counts = [len(values) - rank for rank in ranks]
    selection = Selection(len(values), counts, keys_only=True, bits=bits)
    pieces = pieces_of(Rows(values, [values], "F32"), [1700, 3400, 5000])
    scores = [Magnitudes.scores(piece.base, piece, len(ranks)) for piece in pieces]
    count_all(selection, Runner(), scores, len(digits(bits)))
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.tensor(selection.keys).to(integer).view(dtype).tolist() == ordered[list(ranks)].tolist()
