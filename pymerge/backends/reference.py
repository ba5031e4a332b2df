"""Plain PyTorch, on any device: the references of the ops."""

from __future__ import annotations

from pymerge.common.devices import Device
from pymerge.common.dtypes import DTYPES as ALL

NAME = "reference"
DTYPES = frozenset(ALL)  # whatever they are, they are upcast first


def unavailable(device: Device) -> str | None:
    """None: PyTorch computes wherever its tensors are."""
    return None
