"""One output file while it is written: created at full size, filled at planned offsets, hashed by tensor."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from pymerge.checkpoint.safetensors_file import read_header
from pymerge.common.files import output_error
from pymerge.errors import ArgumentError, CheckpointError, OutputError
from pymerge.output.direct import DirectFile
from pymerge.output.layout import ShardLayout, TensorLayout, layout_file

_CHUNK_BYTES = 64 << 20
# What file systems without preallocation answer; ENOSPC then comes from the writes.
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# Writes of at least this size start on their way to the disk at once, so that the sync at the end finds little to do.
_EARLY_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # start, do not wait
_SYNC_FILE_RANGE: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only


class ShardFile:
    """A `.partial` file. Any failure removes it: a partial shard is never continued, only redone."""

    def __init__(self, layout: ShardLayout, path: Path, *, keeps_cache: bool = True) -> None:
        """Create the file, reserve its full size and write the header. Raises OutputError."""
        self.layout = layout
        self.path = path
        self._drops_cache = not keeps_cache and hasattr(os, "posix_fadvise")
        self._hashes = {tensor.name: hashlib.sha256() for tensor in layout.tensors}
        self._written = dict.fromkeys(self._hashes, 0)
        self._remaining = sum(tensor.nbytes for tensor in layout.tensors)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="pymerge-hash")  # beside the disk, which takes as long
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
        self._pwrite(memoryview(layout.header), 0)

    @property
    def complete(self) -> bool:
        """Whether every byte of every tensor is there."""
        return self._remaining == 0

    def write(self, tensor: TensorLayout, data: memoryview) -> None:
        """Append the next bytes (format "B") of a tensor. Raises OutputError; then the file is gone."""
        done = self._written[tensor.name]
        if done + len(data) > tensor.nbytes:
            self.discard()
            raise OutputError(
                f"{self.path}: internal error: {done + len(data)} bytes for tensor {tensor.name}, "
                f"which has {tensor.nbytes}; please report this"
            )
        hashing = self._hasher.submit(self._hashes[tensor.name].update, data)
        try:
            self._pwrite(data, tensor.offset + done)
        finally:
            hashing.result()
        self._written[tensor.name] = done + len(data)
        self._remaining -= len(data)

    def finish(self, target: Path) -> dict[str, str]:
        """Sync the complete file and rename it to `target`; returns the sha256 of each tensor."""
        try:
            os.fsync(self._descriptor)
            self._drop_cache(0, 0)  # all of it: after the sync no page is dirty
            os.replace(self.path, target)
        except OSError as error:
            self.discard()
            raise output_error(self.path, "finishing the file", error, self.layout.nbytes) from error
        self._close()
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def discard(self) -> None:
        """Close and remove the file; harmless when that was done before."""
        if self._descriptor >= 0:
            self._close()
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._hasher.shutdown()
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
            self.discard()
            raise output_error(self.path, "writing", error, self.layout.nbytes) from error

    def _pwrite_cached(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            count = os.pwrite(self._descriptor, data[done : done + _CHUNK_BYTES], offset + done)
            self._start_writing_out(offset + done, count)
            self._drop_cache(offset + done, count)
            done += count


def has_header(file: Path, layout: ShardLayout, digests: Mapping[str, str]) -> bool:
    """Whether a file has the planned size and header, and there is a checksum of each tensor. Raises OSError."""
    if set(digests) != {tensor.name for tensor in layout.tensors}:
        return False
    if not file.is_file() or file.stat().st_size != layout.nbytes:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(layout.header)) == layout.header


def is_whole(file: Path, layout: ShardLayout, digests: Mapping[str, str]) -> bool:
    """Whether a file has the planned size and header, and each tensor the recorded sha256. Raises OSError."""
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
    digest = hashlib.sha256()
    left = tensor.nbytes
    while left and (piece := stream.read(min(left, _CHUNK_BYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()
