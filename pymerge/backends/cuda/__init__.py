"""CUDA C++ on NVIDIA devices (pymerge._cuda)."""

from __future__ import annotations

from importlib import import_module

from pymerge.common.devices import Device
from pymerge.common.dtypes import DTYPES, NATIVE

NAME = "cuda"


def unavailable(device: Device) -> str | None:
    """Why the CUDA kernels cannot compute on this device; None if they can."""
    try:
        import_module("pymerge._cuda")
    except ImportError as error:
        return f"pymerge._cuda does not load ({error}); install where nvcc is: PYMERGE_CUDA=1 pip install ."
    if device.type != "cuda":
        return f"it computes on NVIDIA devices and the tensors are on {device}; use --device cuda"
    return None


def refuses(op: str, dtypes: frozenset[str]) -> str | None:
    """A reason if the kernels do not know one of the dtypes."""
    unknown = sorted(f"torch.{DTYPES[code].torch}" for code in dtypes - NATIVE.keys())
    if unknown:
        return f"{', '.join(unknown)} is not one of float32, float64, float16, bfloat16"
    if "F64" in dtypes and op in ("task_gram", "wudi_adam"):
        return "it computes in float32 on tensor cores, and float64 was given or asked for"
    if "F64" in dtypes and op == "trim_threshold":
        return "it compares float32 magnitudes, and float64 was given"
    return None
