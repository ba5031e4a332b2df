"""Tensors that no adapter changes: they are the base's, and nothing of them is merged."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.methods.actions import Action
from pymerge.methods.reduce import Reduce
from pymerge.planner.constants import reproduces
from pymerge.planner.match import Section


def untouched(base: TensorEntry, experts: Sequence[TensorEntry], section: Section, action: Action) -> bool:
    """Whether no adapter changes a tensor, and no other model is merged into it: then it is the base's, unread."""
    if not experts or not reproduces(action) or (isinstance(action, Reduce) and action.scope == "model"):
        return False
    adapters = all(expert.base is not None for expert in section.experts)
    return adapters and all(entry.same_bytes(base) for entry in experts)
