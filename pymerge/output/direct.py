"""Writing past the page cache: the disk takes bytes from our memory, and no pages are made to copy them to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
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

    `only_if_fast`: give up on a slow disk, and leave the pages in the cache.
    """

    def __init__(self, path: Path, *, only_if_fast: bool) -> None:
        self._only_if_fast = only_if_fast
        self._bytes, self._seconds = 0, 0.0
        self._stage: mmap.mmap | None = None
        self._descriptor = -1
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
        if self._descriptor < 0 or stop - start < LEAST_BYTES:
            return range(0)
        began = time.perf_counter()
        done = start
        try:
            while done < stop and done % BLOCK == start % BLOCK:  # a write may be cut short, and end anywhere
                done += os.pwrite(self._descriptor, self._aligned(data[done:stop]), offset + done)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self.close()
        self._bytes += done - start
        self._seconds += time.perf_counter() - began
        if self._only_if_fast and self._bytes >= _PROBE_BYTES and self._bytes < _SLOW * self._seconds:
            self.close()
        return range(start, done)

    def close(self) -> None:
        """Nothing is written past the cache any more; harmless when that was done before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _aligned(self, data: memoryview) -> memoryview:
        """The bytes where the disk can take them: as they are, or a copy of the first ones."""
        if not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % BLOCK == 0:
            return data
        if self._stage is None:
            self._stage = mmap.mmap(-1, _STAGE_BYTES)
        count = min(len(data), _STAGE_BYTES)
        self._stage[:count] = data[:count]
        return memoryview(self._stage)[:count]
