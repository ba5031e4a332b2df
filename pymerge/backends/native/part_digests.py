"""sha256 of the parts of a buffer in C++ (pymerge._C), several at a time; without numpy where it may be written."""

from __future__ import annotations

import ctypes


def part_digests(digests: memoryview, data: memoryview, part: int) -> int:
    """Write the sha256 of the first parts of `data`, of `part` bytes but for the last one, to `digests`, one behind the
    other; returns how many: those that are done sooner so than one by one, maybe none."""
    from pymerge import _C

    return _C.part_digests(_address(digests), _address(data), data.nbytes, part)


def _address(memory: memoryview) -> int:
    if not memory.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    import numpy as np

    return np.frombuffer(memory, np.uint8).ctypes.data
