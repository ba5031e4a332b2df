"""Plain PyTorch, on any device: the oracle, and the fallback of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pymerge.ops import OPS

NAME = "reference"


def unavailable(device: torch.device) -> str | None:
    """None: PyTorch computes wherever its tensors are."""
    return None


def implementations() -> Mapping[str, Callable[..., Any]]:
    """All ops."""
    return {name: op.reference for name, op in OPS.items()}


def refuses(op: str, dtypes: frozenset[torch.dtype]) -> str | None:
    """None: every floating dtype is upcast first."""
    return None
