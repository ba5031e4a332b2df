"""C++ on the CPU (pymerge._C), with PyTorch's GEMMs between its passes; arrays need no PyTorch."""

from __future__ import annotations

from importlib import import_module

from pymerge.common.devices import Device
from pymerge.common.dtypes import DTYPES, NATIVE

NAME = "native"

# Ops whose C++ knows float32 results only.
_FLOAT32_OPS = (
    "task_stats",
    "routed_linear",
    "mix_weights",
    "trim_threshold",
    "magnitude_counts",
    "magnitude_place",
    "magnitude_mask",
    "random_mask",
)


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


def refuses(op: str, dtypes: frozenset[str]) -> str | None:
    """A reason if the C++ code does not know one of the dtypes."""
    unknown = sorted(f"torch.{DTYPES[code].torch}" for code in dtypes - NATIVE.keys())
    if unknown:
        return f"{', '.join(unknown)} is not one of float32, float64, float16, bfloat16"
    if "F64" in dtypes and op in _FLOAT32_OPS:
        return "its sums are float32, and float64 was given"
    return None
