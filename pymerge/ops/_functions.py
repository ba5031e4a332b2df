"""Ops in their older form, to be replaced by pymerge.ops._op: a name, a check, a reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class FunctionOp:
    """One numerical operation as functions of the same arguments."""

    name: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    summary: str
    each_layer: Callable[..., Any] | None = None

    @property
    def takes_batches(self) -> bool:
        return self.each_layer is not None

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(inspect.signature(self.reference).parameters)
