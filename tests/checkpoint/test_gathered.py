"""Gathered tables: rows of several stored tables, zeros, averages and means, read in any pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import TensorEntry, open_checkpoint
from pymerge.checkpoint.gathered import gathered
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.row_map import AVERAGE, MEAN, ZERO, RowMap
from pymerge.errors import CheckpointError
from tests.helpers.quantised import fp8, random


def stored(folder: Path, *tables: torch.Tensor) -> tuple[list[TensorEntry], Reader]:
    """The tables, each in a file of its own, and a reader of them."""
    entries, stamps = [], {}
    for number, table in enumerate(tables):
        file = folder / f"{number}.safetensors"
        save_file({"padding": torch.zeros(3, dtype=torch.uint8), "table": table}, file)
        checkpoint = open_checkpoint(file)
        entries.append(checkpoint.tensors["table"])
        stamps |= checkpoint.stamps
    return entries, Reader(stamps)


def row_map(pairs: list[tuple[int, int]], averages: tuple[tuple[tuple[int, int], ...], ...] = ()) -> RowMap:
    source, row = zip(*pairs, strict=True)
    return RowMap(np.array(source, np.int64), np.array(row, np.int64), averages)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 8)), min_size=1, max_size=30), st.data())
def test_rows_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    tables = [torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    entries, reader = stored(tmp_path_factory.mktemp("gather"), *tables)
    entry = gathered(entries[0], row_map(pairs), entries)
    expected = torch.stack([torch.zeros(5) if source == ZERO else tables[source][row] for source, row in pairs])
    start = data.draw(st.integers(0, len(pairs)))
    stop = data.draw(st.integers(start, len(pairs)))
    with reader:
        assert torch.equal(reader.read(entry), expected)
        assert torch.equal(reader.read(entry, start, stop), expected[start:stop])
        reader.announce(entry, start, stop)
        reader.release(entry, start, stop)


def test_averages_and_means_are_rounded_once(tmp_path: Path) -> None:
    tables = [torch.randn(6, 700, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(2)]
    entries, reader = stored(tmp_path, *tables)
    pairs = [(0, 3), (AVERAGE, 0), (ZERO, 0), (1, 5), (MEAN, 0), (MEAN, 0)]
    entry = gathered(entries[0], row_map(pairs, (((0, 1), (1, 2)),)), entries)
    assert (entry.dtype, entry.shape, entry.nbytes) == ("BF16", (6, 700), 6 * 700 * 2)
    average = ((tables[0][1].double() + tables[1][2].double()) / 2).bfloat16()
    own = torch.stack([tables[0][3], average, torch.zeros(700).bfloat16(), tables[1][5]])
    mean = own.double().mean(0).bfloat16()
    with reader:
        assert torch.equal(reader.read(entry, 4, 6), mean.expand(2, -1))
        assert torch.equal(reader.read(entry), torch.cat([own, mean.expand(2, -1)]))


def test_the_dtype_holds_all_sources(tmp_path: Path) -> None:
    half, brain = torch.randn(3, 4).half(), torch.randn(3, 4).bfloat16()
    small = torch.randn(3, 4).to(torch.float8_e4m3fn)
    entries, reader = stored(tmp_path, half, brain, small)
    both = gathered(entries[0], row_map([(0, 2), (1, 1), (2, 0)]), entries)
    assert both.dtype == "F32"
    eight = gathered(entries[2], row_map([(2, 2), (ZERO, 0)]), entries)
    assert eight.dtype == "F8_E4M3"
    assert gathered(entries[2], row_map([(2, 2), (MEAN, 0)]), entries).dtype == "BF16"
    with reader:
        assert torch.equal(reader.read(both), torch.stack([half[2].float(), brain[1].float(), small[0].float()]))
        assert torch.equal(reader.read(eight).float(), torch.stack([small[2].float(), torch.zeros(4)]))


def test_tables_of_torch_save_and_changed_files(tmp_path: Path) -> None:
    table = torch.randn(4, 6)
    torch.save({"table": table.t()}, tmp_path / "t.bin")  # a view: its rows lie apart
    checkpoint = open_checkpoint(tmp_path / "t.bin")
    own = checkpoint.tensors["table"]
    entry = gathered(own, row_map([(0, 5), (0, 0), (0, 1)]), [own])
    with Reader(checkpoint.stamps) as reader:
        assert torch.equal(reader.read(entry), table.t()[[5, 0, 1]])
    entries, reader = stored(tmp_path, table)
    entry = gathered(entries[0], row_map([(0, 3)]), entries)
    with reader, (tmp_path / "0.safetensors").open("r+b") as file:
        file.truncate(100)
        with pytest.raises(CheckpointError, match="changed since the plan was made"):
            reader.read(entry)


def test_a_map_says_what_it_is() -> None:
    assert row_map([(1, 0), (1, 1)]).is_identity(1)
    assert not row_map([(1, 0), (1, 1)]).is_identity(0)
    assert not row_map([(1, 1), (1, 0)]).is_identity(1)
    found = row_map([(0, 0), (0, 1), (ZERO, 0), (ZERO, 0), (1, 4), (1, 5), (1, 7)])
    assert list(found.runs(0, 7)) == [(0, 2, 0, 0), (2, 4, ZERO, 0), (4, 6, 1, 4), (6, 7, 1, 7)]
    assert list(found.runs(1, 5)) == [(1, 2, 0, 1), (2, 4, ZERO, 0), (4, 5, 1, 4)]
    assert found.digest() != row_map([(0, 0), (0, 1), (ZERO, 0), (ZERO, 0), (1, 4), (1, 5), (1, 6)]).digest()


def test_rows_of_tables_that_are_decoded(tmp_path: Path) -> None:
    quantised = fp8(random(9, 6), name="table", scale="table_scale", blocks=(1, 6))
    other = random(7, 6, seed=1).bfloat16()
    entries, stamps = [], {}
    for number, tensors in enumerate((quantised.stored, {"table": other})):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        checkpoint = open_checkpoint(tmp_path / f"{number}.safetensors")
        entries.append(checkpoint.tensors["table"])
        stamps |= checkpoint.stamps
    pairs = [(0, 3), (0, 4), (1, 2), (ZERO, 0), (AVERAGE, 0), (0, 8), (MEAN, 0)]
    entry = gathered(entries[0], row_map(pairs, (((0, 1), (1, 2)),)), entries)
    assert entry.dtype == "F32"
    assert entry.decoded_from == "FP8 (E4M3), a scale for each row"
    plain = quantised.values["table"]
    average = (plain[1].double() + other[2].double()) / 2
    own = torch.stack([plain[3], plain[4], other[2].float(), torch.zeros(6), average.float(), plain[8]])
    expected = torch.cat([own, own.double().mean(0, keepdim=True).float()])
    with Reader(stamps) as reader:
        torch.testing.assert_close(reader.read(entry), expected, rtol=1e-6, atol=0)
        assert torch.equal(reader.read(entry, 0, 6), own)
        assert torch.equal(reader.read(entry, 1, 3), own[1:3])
