"""One output file while it is written: created at full size, filled at planned offsets, hashed by tensor.

What is to be done with the bytes of a piece is told as tasks, for whoever owns threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pymerge.checkpoint.safetensors_file import read_header
from pymerge.common.files import output_error
from pymerge.errors import ArgumentError, CheckpointError, OutputError
from pymerge.output.digests import Digest
from pymerge.output.direct import DirectFile
from pymerge.output.layout import ShardLayout, TensorLayout, layout_file

_CHUNK_BYTES = 64 << 20
# What one thread writes at once of a larger piece. It ends where the file has a whole number of them, and so, like the
# blocks of a disk.
_SLICE_BYTES = 16 << 20
# What file systems without preallocation answer; ENOSPC then comes from the writes.
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# Writes of at least this size start on their way to the disk at once, so that the sync at the end finds little to do.
_EARLY_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # start, do not wait
_SYNC_FILE_RANGE: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only


class Task(NamedTuple):
    """Something left to be done with `nbytes` bytes of a tensor, by any thread, but once. Its `run` raises OutputError.

    The bytes must stay as they are until then.
    """

    kind: Literal["write", "hash"]
    nbytes: int
    run: Callable[[], None]


class ShardFile:
    """A `.partial` file. Any failure removes it: a partial shard is never continued, only redone.

    One thread calls `take`, any do what it returns.
    """

    def __init__(self, layout: ShardLayout, path: Path, *, keeps_cache: bool = True) -> None:
        """Create the file, reserve its full size and write the header. Raises OutputError."""
        self.layout = layout
        self.path = path
        self._drops_cache = not keeps_cache and hasattr(os, "posix_fadvise")
        self._digests = {tensor.name: Digest(tensor.nbytes) for tensor in layout.tensors}
        self._taken = dict.fromkeys(self._digests, 0)
        self._lock = threading.Lock()
        self._left = sum(tensor.nbytes for tensor in layout.tensors)  # bytes to be taken
        self._tasks = 0  # that are not done
        self._descriptor = -1
        self._direct: DirectFile | None = None
        self.began = time.monotonic()
        try:
            self._create()
            self._reserve()
            self._direct = DirectFile(path, only_if_fast=keeps_cache)
        except OSError as error:
            self.discard()
            raise output_error(path, "creating the file", error, layout.nbytes) from error
        try:
            self._pwrite(memoryview(layout.header), 0)
        except OutputError:
            self.discard()
            raise

    def take(self, tensor: TensorLayout, data: memoryview) -> list[Task]:
        """Take the next bytes (format "B") of a tensor; returns what is to be done with them, in any order.

        When a task is done, `ended` must be told. Raises OutputError.
        """
        done = self._taken[tensor.name]
        if done + len(data) > tensor.nbytes:
            self._remove()
            raise OutputError(
                f"{self.path}: internal error: {done + len(data)} bytes for tensor {tensor.name}, "
                f"which has {tensor.nbytes}; please report this"
            )
        tasks = [Task("hash", each.nbytes, each.run) for each in self._digests[tensor.name].take(data)]
        for place, some in _slices(tensor.offset + done, data):
            tasks.append(Task("write", len(some), partial(self._pwrite, some, place)))
        self._taken[tensor.name] = done + len(data)
        with self._lock:
            self._tasks += len(tasks)
            self._left -= len(data)
        return tasks

    def ended(self) -> bool:
        """A task is done; returns whether it was the last one, and every byte of every tensor is there."""
        with self._lock:
            self._tasks -= 1
            return self._tasks == self._left == 0

    def finish(self, target: Path) -> dict[str, str]:
        """Sync the complete file and rename it to `target`; returns the digest of each tensor."""
        try:
            os.fsync(self._descriptor)
            self._drop_cache(0, 0)  # all of it: after the sync no page is dirty
            os.replace(self.path, target)
        except OSError as error:
            self.discard()
            raise output_error(self.path, "finishing the file", error, self.layout.nbytes) from error
        self._close()
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def discard(self) -> None:
        """Remove the file, and close it; harmless when that was done before. No task may be under way."""
        if self._descriptor >= 0:
            self._remove()
            self._close()

    def _remove(self) -> None:
        """Remove the file. It stays open: other tasks may be writing to it, and its number could become another's."""
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def _drop_cache(self, offset: int, nbytes: int) -> None:
        """Have pages written to the disk if they are dirty, and dropped if not, so that a sync finds little to do."""
        if self._drops_cache:
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _start_writing_out(self, offset: int, nbytes: int) -> None:
        """Only advice: the sync at the end waits for all, and tells about errors."""
        if _SYNC_FILE_RANGE is not None and nbytes >= _EARLY_BYTES:
            place = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
            _SYNC_FILE_RANGE(self._descriptor, *place, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def _create(self) -> None:
        """Make the file, locked as long as it is open, which tells other processes that somebody is writing it."""
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if os.fstat(self._descriptor).st_nlink:
                return
            os.close(self._descriptor)  # removed before it was locked

    def _reserve(self) -> None:
        nbytes = self.layout.nbytes
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in _NO_PREALLOCATION:
                    raise
        os.ftruncate(self._descriptor, nbytes)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        try:
            assert self._direct is not None
            direct = self._direct.pwrite(data, offset)
            self._pwrite_cached(data[: direct.start], offset)
            self._pwrite_cached(data[direct.stop :], offset + direct.stop)
        except OSError as error:
            self._remove()
            raise output_error(self.path, "writing", error, self.layout.nbytes) from error

    def _pwrite_cached(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            count = os.pwrite(self._descriptor, data[done : done + _CHUNK_BYTES], offset + done)
            self._start_writing_out(offset + done, count)
            self._drop_cache(offset + done, count)
            done += count


def _slices(offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Offsets and bytes of the slices of a piece that begins at byte `offset` of a file."""
    if len(data) < 2 * _SLICE_BYTES:
        yield offset, data
        return
    start = 0
    while start < len(data):
        stop = start + _SLICE_BYTES * 3 // 2
        stop -= (offset + stop) % _SLICE_BYTES
        if len(data) - stop < _SLICE_BYTES // 2:
            stop = len(data)
        yield offset + start, data[start:stop]
        start = stop


def has_header(file: Path, layout: ShardLayout, digests: Mapping[str, str]) -> bool:
    """Whether a file has the planned size and header, and there is a checksum of each tensor. Raises OSError."""
    if set(digests) != {tensor.name for tensor in layout.tensors}:
        return False
    if not file.is_file() or file.stat().st_size != layout.nbytes:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(layout.header)) == layout.header


def is_whole(file: Path, layout: ShardLayout, digests: Mapping[str, str]) -> bool:
    """Whether a file has the planned size and header, and each tensor the recorded digest. Raises OSError."""
    if not has_header(file, layout, digests):
        return False
    with open(file, "rb") as stream:
        return all(_digest(stream, tensor) == digests[tensor.name] for tensor in layout.tensors)


def found_layout(file: Path) -> ShardLayout | None:
    """The layout that a file of ours has, by its header; None if there is no such file, or it is damaged."""
    try:
        entries = read_header(file).entries.values()
        return layout_file(file.name, [(entry.name, entry.dtype, entry.shape) for entry in entries])
    except (CheckpointError, ArgumentError):
        return None


def _digest(stream: BinaryIO, tensor: TensorLayout) -> str:
    stream.seek(tensor.offset)
    digest = Digest(tensor.nbytes)
    left = tensor.nbytes
    while left and (piece := stream.read(min(left, _CHUNK_BYTES))):
        digest.update(memoryview(piece))
        left -= len(piece)
    return digest.hexdigest()
