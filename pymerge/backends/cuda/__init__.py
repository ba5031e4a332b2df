"""CUDA C++ on NVIDIA devices (pymerge._cuda)."""

from __future__ import annotations

from importlib import import_module

from pymerge.common.devices import Device
from pymerge.common.dtypes import NATIVE

NAME = "cuda"
DTYPES = frozenset(NATIVE)


def unavailable(device: Device) -> str | None:
    """Why the CUDA kernels cannot compute on this device; None if they can."""
    try:
        import_module("pymerge._cuda")
    except ImportError as error:
        return f"pymerge._cuda does not load ({error}); install where nvcc is: PYMERGE_CUDA=1 pip install ."
    if device.type != "cuda":
        return f"it computes on NVIDIA devices and the tensors are on {device}; use --device cuda"
    return None
