"""C++ on the CPU (pymerge._C), with PyTorch's GEMMs between its passes; arrays need no PyTorch."""

from __future__ import annotations

from importlib import import_module

from pymerge.common.devices import Device
from pymerge.common.dtypes import NATIVE

NAME = "native"
DTYPES = frozenset(NATIVE)


def missing() -> str | None:
    """Why the C++ extension cannot be used; None if it can."""
    try:
        import_module("pymerge._C")
    except ImportError as error:
        return f"pymerge._C does not load ({error}); install again where a C++20 compiler is: pip install ."
    return None


def unavailable(device: Device) -> str | None:
    """Why C++ cannot compute on this device; None if it can."""
    if device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {device}; use --device cpu or --backend reference"
    return missing()
