"""Writing past the page cache: the same bytes, wherever they lie in file and memory, and whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pymerge.common.arrays import Array
from pymerge.output import direct, shard
from pymerge.output.direct import BLOCK, LEAST_BYTES, DirectFile
from pymerge.output.layout import layout_shards
from pymerge.output.shard import ShardFile

NBYTES = 3 * LEAST_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An empty file, on a file system that can write past the page cache."""
    path = tmp_path / "file"
    path.touch()
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    return path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each write past the cache."""
    counts: list[int] = []
    pwrite = os.pwrite

    def pwrite_noting(descriptor: int, data: memoryview, offset: int) -> int:
        count = pwrite(descriptor, data, offset)
        if is_direct(descriptor):
            counts.append(count)
        return count

    monkeypatch.setattr(os, "pwrite", pwrite_noting)
    return counts


def random_bytes(nbytes: int, shift: int = 0) -> memoryview:
    """At an address that is `shift` bytes behind the beginning of a page."""
    room = Array.mapped(shift + nbytes).bytes
    room[shift : shift + nbytes] = np.random.default_rng(0).bytes(nbytes)
    return room[shift : shift + nbytes]


@pytest.mark.parametrize("shift", [0, 1, 64])
@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 8])
def test_whole_blocks_are_written(file: Path, offset: int, shift: int) -> None:
    data = random_bytes(NBYTES + 777, shift)
    writer = DirectFile(file, only_if_fast=False)
    done = writer.pwrite(data, offset)
    writer.close()
    assert [(done.start + offset) % BLOCK, (done.stop + offset) % BLOCK] == [0, 0]
    assert 0 <= done.start < BLOCK
    assert NBYTES + 777 - BLOCK < done.stop <= NBYTES + 777
    assert file.read_bytes()[offset + done.start :] == data[done.start : done.stop]


def test_little_is_left_to_the_cache(file: Path, written: list[int]) -> None:
    writer = DirectFile(file, only_if_fast=False)
    assert not writer.pwrite(random_bytes(LEAST_BYTES - 1), 0)
    assert not writer.pwrite(random_bytes(LEAST_BYTES), 1)
    assert not writer.pwrite(random_bytes(BLOCK // 2), BLOCK - 1)
    assert written == []
    assert writer.pwrite(random_bytes(LEAST_BYTES), BLOCK) == range(LEAST_BYTES)
    assert written == [LEAST_BYTES]


@pytest.mark.parametrize("sizes", [[NBYTES, 100, NBYTES + 3], [100, NBYTES, NBYTES + 8191, NBYTES]])
def test_pieces_of_any_size_make_up_a_file(file: Path, written: list[int], sizes: list[int]) -> None:
    """Blocks that two pieces share are in the cache, the others are not; what is read is the same."""
    data = random_bytes(sum(sizes))
    (layout,) = layout_shards([("x", "U8", (sum(sizes),))], 2**40)
    whole = ShardFile(layout, file)
    done = 0
    for size in sizes:
        write(whole, data[done : done + size])
        done += size
    whole.finish(file)
    assert file.read_bytes() == layout.header + bytes(data)
    assert sum(written) > sum(sizes) - (2 * len(sizes) + 1) * BLOCK


def test_a_file_system_that_cannot(file: Path, written: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Callable[..., int] = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert_written(file)
    assert written == []


def test_a_file_system_that_wants_larger_blocks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so at the first write; the second one is not even tried."""
    tried = []
    pwrite = os.pwrite

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            tried.append(offset)
            raise OSError(errno.EINVAL, "not aligned")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    assert_written(file)
    assert tried == [BLOCK]


@pytest.mark.parametrize("count", [BLOCK, BLOCK + 512, LEAST_BYTES - 1])
def test_writes_that_are_cut_short(file: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    pwrite = os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        if not is_direct(descriptor) or count % BLOCK == 0:
            return pwrite(descriptor, data[:count], offset)
        assert pwrite(descriptor, data, offset) == len(data)
        return count

    monkeypatch.setattr(os, "pwrite", short)
    assert_written(file)


@pytest.mark.parametrize(("seconds", "only_if_fast", "expected"), [(0.001, True, 3), (1, True, 1), (1, False, 3)])
def test_a_slow_disk_is_left_to_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, only_if_fast: bool, expected: int
) -> None:
    """A mebibyte and more in a second is slow, in a thousandth of one it is not."""
    monkeypatch.setattr(direct, "_PROBE_BYTES", LEAST_BYTES)
    ticks = iter(np.arange(100) * seconds)
    monkeypatch.setattr(direct.time, "perf_counter", lambda: next(ticks))
    writer = DirectFile(file, only_if_fast=only_if_fast)
    done = [len(writer.pwrite(random_bytes(LEAST_BYTES), LEAST_BYTES * number)) for number in range(3)]
    assert done == [LEAST_BYTES] * expected + [0] * (3 - expected)


def test_threads_write_the_slices_of_a_large_piece(file: Path, written: list[int]) -> None:
    """A slice ends where one can go past the cache; the time of threads that write together counts once."""
    size = 5 * shard._SLICE_BYTES + 4097
    data = random_bytes(size)
    (layout,) = layout_shards([("x", "U8", (size,))], 2**40)
    whole = ShardFile(layout, file)
    tasks = whole.take(layout.tensors[0], data)
    assert sum(task.nbytes for task in tasks if task.kind == "write") == size
    assert sum(task.kind == "write" for task in tasks) == 5
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: task.run(), tasks))
    assert [whole.ended() for _ in tasks] == [False] * (len(tasks) - 1) + [True]
    whole.finish(file)
    assert file.read_bytes() == layout.header + bytes(data)
    assert sum(written) > size - 2 * BLOCK


def write(whole: ShardFile, data: memoryview) -> None:
    for task in whole.take(whole.layout.tensors[0], data):
        task.run()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def assert_written(file: Path) -> None:
    """Two pieces make up a file, whatever happens to some of the writes."""
    data = random_bytes(2 * NBYTES)
    (layout,) = layout_shards([("x", "U8", (2 * NBYTES,))], 2**40)
    whole = ShardFile(layout, file)
    write(whole, data[:NBYTES])
    write(whole, data[NBYTES:])
    whole.finish(file)
    assert file.read_bytes() == layout.header + bytes(data)
