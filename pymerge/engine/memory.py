"""Memory of this process: its largest size so far, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Heap:
    """Gives freed memory back to the system.

    Left alone, glibc keeps freed blocks of up to 32 MiB for later use. Tensors are freed on other threads than those
    that allocate, in other sizes than the next ones, and the process would grow from layer to layer. So large blocks
    are mapped one by one, and what has gathered from smaller ones is returned now and then; both by measure of the
    limit on tensors. Other C libraries don't hold on, and have neither function.
    """

    _MMAP_THRESHOLD = -3  # mallopt's name for it

    def __init__(self, limit: int) -> None:
        self._kept = 0
        self._most = min(max(limit // 16, 2**21), 2**25)
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        if hasattr(library, "mallopt"):
            library.mallopt(self._MMAP_THRESHOLD, min(max(limit // 64, 2**18), 2**23))

    def freed(self, count: int) -> None:
        """`count` bytes have been freed since the last call."""
        self._kept += count
        if self._kept >= self._most:
            self.trim()

    def trim(self) -> None:
        """Return what is free now."""
        self._kept = 0
        if self._trim is not None:
            self._trim(0)
