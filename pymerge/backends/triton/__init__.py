"""Triton kernels on NVIDIA devices (pymerge.kernels), or on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
from importlib import import_module

from pymerge.common.devices import Device

NAME = "triton"
DTYPES = frozenset({"F32", "F16", "BF16"})


def interpreted() -> bool:
    """True if Triton runs kernels on the CPU, for tests; Triton reads the variable when it defines them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: Device) -> str | None:
    """Why Triton cannot compute on this device; None if it can."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton does not load ({error}); install it: pip install 'pymerge-engine[triton]'"
    if device.type != "cuda" and not interpreted():
        return f"Triton needs an NVIDIA device and the tensors are on {device}; use --device cuda"
    return None
