"""Precision of float32 products on CUDA: IEEE's while ops compute, whatever the process has set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Setting:
    """Setting of the process in both of PyTorch's ways: a switch of old, and a precision since 2.9.

    PyTorch refuses to compute or to tell where the two say different things, so the switch is what is turned: it sets
    both. A process that has set the precision alone cannot be asked for the switch, which then is off.
    """

    def __init__(self) -> None:
        import torch

        self._matmul: Any = torch.backends.cuda.matmul
        try:
            self._switch = torch.get_float32_matmul_precision()
        except RuntimeError:
            self._switch = "highest"
        self._cuda = getattr(self._matmul, "fp32_precision", None)
        if self._cuda is not None:
            cpu: Any = torch.backends.mkldnn
            self._mkldnn = cpu.matmul
            self._cpu = self._mkldnn.fp32_precision
        self._matmul.allow_tf32 = False

    def restore(self) -> None:
        """Leave everything as it was found."""
        import torch

        if self._switch != "highest":
            torch.set_float32_matmul_precision(self._switch)  # of CPUs, too
        if self._cuda is not None:
            self._matmul.fp32_precision = self._cuda
            self._mkldnn.fp32_precision = self._cpu


_lock = threading.Lock()
_inside = 0  # computations under way, of all threads
_found: _Setting | None = None


@contextmanager
def ieee_products(device: str) -> Iterator[None]:
    """Compute with a device of this kind: on "cuda" no product of float32 is one of TF32.

    The setting is the process's. It is given back when the last computation ends that is under way, in any thread.
    """
    if device != "cuda":
        yield
        return
    global _inside, _found
    with _lock:
        if _inside == 0:
            _found = _Setting()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _found is not None:
                _found.restore()
                _found = None
