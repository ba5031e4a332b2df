"""Precision of float32 products: IEEE's while ops compute, whatever the process has set."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class _Held(Protocol):
    """A setting of the process that was changed, and can be given back."""

    def restore(self) -> None:
        """Leave everything as it was found."""


class _OfCuda:
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
        import torch

        if self._switch != "highest":
            torch.set_float32_matmul_precision(self._switch)  # of CPUs, too
        if self._cuda is not None:
            self._matmul.fp32_precision = self._cuda
            self._mkldnn.fp32_precision = self._cpu


class _OfCpus:
    """Precision of the library that PyTorch multiplies with on CPUs, where something else than IEEE's is set.

    Before PyTorch 2.9 the switch of old is all that there is.
    """

    def __init__(self) -> None:
        import torch

        products: Any = getattr(torch.backends.mkldnn, "matmul", None)
        self._products = products if hasattr(products, "fp32_precision") else None
        self._found = torch.get_float32_matmul_precision() if self._products is None else products.fp32_precision
        if self._found not in ("none", "ieee", "highest"):
            self._set("highest" if self._products is None else "ieee")

    def restore(self) -> None:
        if self._found in ("none", "ieee", "highest"):
            return
        if self._products is not None:
            self._set("none")  # it may have been what is set for all libraries, and follow that again
            if self._products.fp32_precision == self._found:
                return
        self._set(self._found)

    def _set(self, precision: str) -> None:
        import torch

        if self._products is None:
            torch.set_float32_matmul_precision(precision)
        else:
            self._products.fp32_precision = precision


_SETTINGS: dict[str, type[_OfCuda | _OfCpus]] = {"cuda": _OfCuda, "cpu": _OfCpus}
_lock = threading.Lock()
_inside: dict[str, int] = dict.fromkeys(_SETTINGS, 0)  # computations under way, of all threads
_found: dict[str, _Held] = {}


@contextmanager
def ieee_products(device: str) -> Iterator[None]:
    """Compute with a device of this kind, "cuda" or "cpu": no product of float32 is one of TF32 or bfloat16.

    The setting is the process's. It is given back when the last computation ends that is under way, in any thread. On a
    CPU nothing is set while PyTorch has not been imported.
    """
    if device not in _SETTINGS or (device == "cpu" and "torch" not in sys.modules):
        yield
        return
    with _lock:
        if _inside[device] == 0:
            _found[device] = _SETTINGS[device]()
        _inside[device] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[device] -= 1
            if _inside[device] == 0:
                _found.pop(device).restore()
