"""Digest of a tensor: sha256 of its bytes, or of the sha256 of its parts, which any threads may compute."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from pymerge.backends import native

# Bytes of a part. Pieces of a tensor seldom end where a part does, and what is begun is copied; parts are much
# smaller than pieces, and still take a hundred times what it takes to call the hash function.
PART_BYTES = 1 << 18
_TASK_BYTES = 1 << 22  # of parts that are hashed together, to be worth handing to another thread
_SIZE = hashlib.sha256().digest_size


class Hashing(NamedTuple):
    """Some parts to be hashed by `run`: by any thread, but once. Their bytes must stay as they are until then."""

    nbytes: int
    run: Callable[[], None]


class Digest:
    """Digest of `nbytes` bytes that come in their order, piece by piece.

    Of at most PART_BYTES it is their sha256. Of more it is the sha256 of the sha256 (binary, one after the other) of
    parts of PART_BYTES, the last one maybe shorter.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._found = bytearray(hashlib.sha256().digest() if nbytes == 0 else _SIZE * -(-nbytes // PART_BYTES))
        self._taken = 0
        self._begun = bytearray()  # a part of which more is to come

    def take(self, data: memoryview) -> list[Hashing]:
        """Take the next bytes (format "B"); returns what is left to do."""
        tasks: list[Hashing] = []
        if self._begun:
            count = min(PART_BYTES - len(self._begun), len(data))
            self._begun += data[:count]
            self._taken += count
            data = data[count:]
            if len(self._begun) < PART_BYTES and self._taken < self._nbytes:
                return tasks
            tasks.append(self._hashing(memoryview(self._begun), self._taken - len(self._begun)))
            self._begun = bytearray()
        ends = self._taken + len(data) == self._nbytes
        whole = len(data) if ends else len(data) // PART_BYTES * PART_BYTES
        for start in range(0, whole, _TASK_BYTES):
            some = data[start : min(start + _TASK_BYTES, whole)]
            tasks.append(self._hashing(some, self._taken + start))
        self._begun += data[whole:]
        self._taken += len(data)
        return tasks

    def update(self, data: memoryview) -> None:
        """Take the next bytes (format "B"), and hash them now."""
        for task in self.take(data):
            task.run()

    def hexdigest(self) -> str:
        """The digest (hex) of all bytes, when all that `take` has returned is done."""
        found = self._found if len(self._found) == _SIZE else hashlib.sha256(self._found).digest()
        return found.hex()

    def _hashing(self, data: memoryview, offset: int) -> Hashing:
        return Hashing(len(data), partial(self._hash, data, offset))

    def _hash(self, data: memoryview, offset: int) -> None:
        """Hash parts, of which the first begins at byte `offset`."""
        found = memoryview(self._found)[_SIZE * (offset // PART_BYTES) :]
        done = 0
        if len(data) > PART_BYTES and _has_native():
            from pymerge.backends.native.part_digests import part_digests

            done = part_digests(found, data, PART_BYTES)
        for number in range(done, -(-len(data) // PART_BYTES)):
            part = data[PART_BYTES * number : PART_BYTES * (number + 1)]
            found[_SIZE * number : _SIZE * (number + 1)] = hashlib.sha256(part).digest()


@cache
def _has_native() -> bool:
    return native.missing() is None
