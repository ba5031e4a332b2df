"""Positional reads: every slice equals the safetensors library's, every change of a file is noticed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.checkpoint import open_files
from pymerge.checkpoint import reader as reader_module
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype
from pymerge.errors import ArgumentError, CheckpointError
from tests.helpers.checkpoints import OF_TENSORS


def equal_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for code, dtype in ((code, torch_dtype(code)) for code in OF_TENSORS):
        raw = torch.randint(0, 2 if code == "BOOL" else 256, (6 * 5 * dtype.itemsize,), generator=generator)
        tensors[f"{code}.matrix"] = raw.to(torch.uint8).view(dtype).reshape(6, 5)
        tensors[f"{code}.scalar"] = tensors[f"{code}.matrix"][0, 0].clone()
        tensors[f"{code}.empty"] = torch.empty(0, 3, dtype=dtype)
        tensors[f"{code}.stack"] = tensors[f"{code}.matrix"].reshape(3, 2, 5).clone()
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def test_whole_tensors_and_rows_of_every_dtype(checkpoint: Checkpoint) -> None:
    expected = load_file(checkpoint.files[0])
    with Reader(checkpoint.stamps) as reader:
        for name, entry in checkpoint.tensors.items():
            assert equal_bytes(reader.read(entry), expected[name])
            if entry.shape:
                rows = entry.shape[0]
                for start in range(rows + 1):
                    for stop in range(start, rows + 1):
                        assert equal_bytes(reader.read(entry, start, stop), expected[name][start:stop])


def test_tensors_are_fresh_and_writable(checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors["F32.matrix"]
    with Reader(checkpoint.stamps) as reader:
        first = reader.read(entry)
        first.zero_()
        assert equal_bytes(reader.read(entry), load_file(checkpoint.files[0])["F32.matrix"])


def test_files_are_announced_in_long_ranges(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that is announced is advised; what goes on where the last range ended, with more behind it."""
    advised: list[tuple[int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            advised.append((offset, offset + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(reader_module, "_ANNOUNCED_BYTES", 500)
    entries = sorted((entry for entry in checkpoint.tensors.values() if entry.nbytes), key=lambda entry: entry.offset)
    first, far = entries[0], entries[-1]
    with Reader(checkpoint.stamps) as reader:
        reader.announce(first)
        assert advised == [(first.offset, first.offset + first.nbytes)]
        for entry in entries:
            reader.announce(entry)
            assert any(start <= entry.offset and entry.offset + entry.nbytes <= stop for start, stop in advised)
        assert len(advised) < len(entries) // 2
        advised.clear()
        reader.announce(first)  # from the front again
        reader.announce(far)
        assert advised == [(each.offset, each.offset + each.nbytes) for each in (first, far)]


def test_small_chunks_give_the_same_bytes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 7)
    expected = load_file(checkpoint.files[0])
    with Reader(checkpoint.stamps) as reader:
        for name, entry in checkpoint.tensors.items():
            assert equal_bytes(reader.read(entry), expected[name])


def test_read_into_a_buffer(checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors["BF16.matrix"]
    buffer = torch.full((4, 5), torch.nan, dtype=torch.bfloat16)
    with Reader(checkpoint.stamps) as reader:
        reader.read_into(entry, buffer[1:3], 2, 4)
        expected = load_file(checkpoint.files[0])["BF16.matrix"]
        assert equal_bytes(buffer[1:3], expected[2:4])
        assert bool(buffer[0].isnan().all())
        assert bool(buffer[3].isnan().all())
        for wrong in (buffer, buffer[:2].float(), torch.empty(5, 2, dtype=torch.bfloat16).t()):
            with pytest.raises(ArgumentError, match=r"BF16.matrix: cannot read BF16 \(2, 5\) into"):
                reader.read_into(entry, wrong, 2, 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (4, 3), (7, None)])
def test_rows_outside_the_tensor_are_refused(start: int, stop: int | None, checkpoint: Checkpoint) -> None:
    with Reader(checkpoint.stamps) as reader, pytest.raises(ArgumentError, match="has rows 0 to 6"):
        reader.read(checkpoint.tensors["F32.matrix"], start, stop)


def test_a_scalar_cannot_be_split(checkpoint: Checkpoint) -> None:
    with Reader(checkpoint.stamps) as reader:
        scalar = checkpoint.tensors["F64.scalar"]
        assert reader.read(scalar, 0, 1).shape == ()
        with pytest.raises(ArgumentError, match="has rows 0 to 1, not 0 to 0"):
            reader.read(scalar, 0, 0)


def test_many_threads_and_more_files_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MAX_DESCRIPTORS", 3)
    entries: list[TensorEntry] = []
    stamps: dict[Path, tuple[int, int]] = {}
    for number in range(12):
        save_file({"x": torch.full((50, 40), float(number))}, tmp_path / f"{number}.safetensors")
        opened = open_checkpoint(tmp_path / f"{number}.safetensors")
        entries.append(opened.tensors["x"])
        stamps.update(opened.stamps)

    def held() -> int:
        """Descriptors of these files: others of the process come and go with what is collected."""
        links = Path("/proc/self/fd").iterdir()
        return sum(str(tmp_path) in os.readlink(link) for link in links if os.path.lexists(link))

    before = held()
    with Reader(stamps) as reader, ThreadPoolExecutor(8) as pool:

        def work(number: int) -> bool:
            rows = reader.read(entries[number % 12], number % 40, number % 40 + 10)
            reader.release(entries[number % 12], number % 40, number % 40 + 10)
            return torch.equal(rows, torch.full((10, 40), float(number % 12)))

        assert all(pool.map(work, range(600)))
        assert held() <= before + 6
    assert held() == before


def test_a_file_changed_before_it_is_opened(checkpoint: Checkpoint) -> None:
    os.utime(checkpoint.files[0], ns=(1, 1))
    with (
        Reader(checkpoint.stamps) as reader,
        pytest.raises(CheckpointError, match="changed since the plan was made"),
    ):
        reader.read(checkpoint.tensors["F32.matrix"])


def test_a_file_changed_while_it_is_open(checkpoint: Checkpoint) -> None:
    with Reader(checkpoint.stamps) as reader:
        reader.read(checkpoint.tensors["F32.matrix"])
        os.utime(checkpoint.files[0], ns=(1, 1))
        with pytest.raises(CheckpointError, match="changed since the plan was made"):
            reader.read(checkpoint.tensors["F32.matrix"])


def test_a_file_cut_short_while_it_is_open(checkpoint: Checkpoint) -> None:
    entry = list(checkpoint.tensors.values())[-1]
    with Reader(checkpoint.stamps) as reader:
        reader.read(entry)
        os.truncate(checkpoint.files[0], entry.offset + 1)
        with pytest.raises(CheckpointError, match=f"ends at byte {entry.offset + 1}, inside tensor '{entry.name}'"):
            reader.read(entry)


def test_a_file_that_is_gone(checkpoint: Checkpoint) -> None:
    checkpoint.files[0].unlink()
    with (
        Reader(checkpoint.stamps) as reader,
        pytest.raises(CheckpointError, match=r"cannot be opened.*plan again"),
    ):
        reader.read(checkpoint.tensors["F32.matrix"])


def test_files_outside_the_plan_and_closed_readers_are_refused(checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors["F32.matrix"]
    with Reader({}) as empty, pytest.raises(ArgumentError, match="not a file of this plan"):
        empty.read(entry)
    reader = Reader(checkpoint.stamps)
    reader.read(entry)
    reader.close()
    reader.close()
    with pytest.raises(ArgumentError, match="the reader is closed"):
        reader.read(entry)
