"""Writing past the page cache: the disk takes bytes from our memory, and no pages are made to copy them to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from pathlib import Path

# Where ranges of a file, and of memory, begin and end that may go past the cache: a multiple of the blocks of all
# common disks, and whole pages, so that none is partly in the cache.
BLOCK = max(4096, mmap.PAGESIZE)
# A range of less is copied to the cache sooner than its write would be answered.
LEAST_BYTES = 1 << 20
_STAGE_BYTES = 1 << 20  # what is copied at once where memory is not aligned
# A disk below this, in bytes a second, is what a merge waits for: copying costs it no time, and who loads the result
# next finds it in memory.
_SLOW = 500e6
_PROBE_BYTES = 64 << 20  # written before a disk is called slow

# What file systems answer that cannot, or want larger blocks.
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectFile:
    """An existing file, open to be written past the page cache, as long as that can be had and is worth it.

    `only_if_fast`: give up on a slow disk, and leave the pages in the cache. Several threads may write at once.
    """

    def __init__(self, path: Path, *, only_if_fast: bool) -> None:
        self._only_if_fast = only_if_fast
        self._lock = threading.Lock()
        self._writing = 0  # threads
        self._bytes, self._seconds = 0, 0.0  # written, and while at least one thread wrote
        self._changed = 0.0  # when a write began or ended last
        self._stages = threading.local()
        self._descriptor = -1
        self._given_up = False
        if hasattr(os, "O_DIRECT"):
            try:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise

    def pwrite(self, data: memoryview, offset: int) -> range:
        """Write the whole blocks of `data` (format "B", for byte `offset` of the file on), if there are enough.

        Returns the range of `data` that is written, maybe empty or only a part of the blocks; the rest is left to the
        caller. Raises OSError.
        """
        start = -offset % BLOCK
        stop = start + max(0, len(data) - start) // BLOCK * BLOCK
        if self._descriptor < 0 or self._given_up or stop - start < LEAST_BYTES:
            return range(0)
        done = start
        self._count(1)
        try:
            while done < stop and done % BLOCK == start % BLOCK:  # a write may be cut short, and end anywhere
                done += os.pwrite(self._descriptor, self._aligned(data[done:stop]), offset + done)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self._given_up = True
        finally:
            self._count(-1, done - start)
        return range(start, done)

    def _count(self, change: int, nbytes: int = 0) -> None:
        """A thread begins (1) or ends (-1) to write; a slow disk is given up."""
        with self._lock:
            now = time.perf_counter()
            if self._writing:
                self._seconds += now - self._changed
            self._changed = now
            self._writing += change
            self._bytes += nbytes
            if self._only_if_fast and self._bytes >= _PROBE_BYTES and self._bytes < _SLOW * self._seconds:
                self._given_up = True

    def close(self) -> None:
        """Close the file, when nobody writes to it any more; harmless when that was done before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _aligned(self, data: memoryview) -> memoryview:
        """The bytes where the disk can take them: as they are, or a copy of the first ones."""
        if not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % BLOCK == 0:
            return data
        if not hasattr(self._stages, "memory"):
            self._stages.memory = mmap.mmap(-1, _STAGE_BYTES)
        stage = self._stages.memory
        count = min(len(data), _STAGE_BYTES)
        stage[:count] = data[:count]
        return memoryview(stage)[:count]
