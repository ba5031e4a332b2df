"""Plain PyTorch, on any device: the references of the ops."""

from __future__ import annotations

from pymerge.common.devices import Device

NAME = "reference"


def unavailable(device: Device) -> str | None:
    """None: PyTorch computes wherever its tensors are."""
    return None


def refuses(op: str, dtypes: frozenset[str]) -> str | None:
    """None: every floating dtype is upcast first."""
    return None
