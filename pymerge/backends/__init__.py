"""Which function computes an op: reference (PyTorch), native (C++), triton or cuda, and why that one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.backends.runner import BACKENDS, Backend, Choice, Dispatcher, check_backend, choose, describe, load

__all__ = ["BACKENDS", "Backend", "Choice", "Dispatcher", "check_backend", "choose", "describe", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: where files are combined as they are read, PyTorch is not needed."""
    if name not in __all__:
        raise AttributeError(f"module 'pymerge.backends' has no attribute {name!r}")
    from pymerge.backends import runner

    return getattr(runner, name)
