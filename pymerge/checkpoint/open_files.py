"""Open input files: few at a time, each as it was when the plan was made."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pymerge.errors import ArgumentError, CheckpointError

# Eight experts of 160 shards would pass the usual limit of 1024 descriptors a process.
_MAX_DESCRIPTORS = 128


class _Descriptor:
    """An open file and how many reads use it right now."""

    __slots__ = ("number", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0


class OpenFiles:
    """Descriptors of the files in `stamps`, which maps each file to its planned (size, mtime_ns). Thread-safe."""

    def __init__(self, stamps: Mapping[Path, tuple[int, int]]) -> None:
        self._stamps = dict(stamps)
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[Path, _Descriptor] = OrderedDict()  # least recently used first
        self._closed = False

    def close(self) -> None:
        """Close all files; those being read by other threads are closed when their read ends."""
        with self._lock:
            self._closed = True
            self._close_idle(0)

    @contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        """Descriptor of a file that stays open inside the block."""
        with self._lock:
            if self._closed:
                raise ArgumentError(f"{path}: the reader is closed; make a new Reader")
            if path not in self._descriptors:
                self._descriptors[path] = _Descriptor(self._open(path))
            held = self._descriptors[path]
            self._descriptors.move_to_end(path)
            held.users += 1
            self._close_idle(_MAX_DESCRIPTORS)
        try:
            yield held.number
        finally:
            with self._lock:
                held.users -= 1
                if self._closed:
                    self._close_idle(0)

    def _open(self, path: Path) -> int:
        if path not in self._stamps:
            raise ArgumentError(f"{path}: is not a file of this plan; give the reader the stamps of its checkpoint")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); was it moved since the plan was made?"
                " Put it back or plan again"
            ) from error
        try:
            self.check(path, descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def check(self, path: Path, descriptor: int) -> None:
        """Raise CheckpointError unless the open file is as planned."""
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != self._stamps[path]:
            raise CheckpointError(
                f"{path}: changed since the plan was made ({self._stamps[path][0]} bytes then, "
                f"{status.st_size} now); make sure that nothing writes to it and start again"
            )

    def _close_idle(self, keep: int) -> None:
        """Close unused descriptors, least recently used first, until `keep` are open. The lock is held."""
        if len(self._descriptors) <= keep:
            return
        for path in list(self._descriptors):
            if len(self._descriptors) <= keep:
                break
            if self._descriptors[path].users == 0:
                os.close(self._descriptors.pop(path).number)
