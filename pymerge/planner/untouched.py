"""Tensors that no adapter changes: they are the base's, and nothing of them is merged."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.methods.actions import Action
from pymerge.methods.base import BaseOptional, Method
from pymerge.methods.reduce import Reduce
from pymerge.planner.match import Section


def untouched(
    method: Method, action: Action, base: TensorEntry, experts: Sequence[TensorEntry], section: Section
) -> bool:
    """Whether a method on task vectors gets none of a tensor: no adapter changes it, and there are no other models.

    What is selected over the whole model counts its zeros, and what can do without a base works on the models.
    """
    if not experts or not method.needs_base or isinstance(method, BaseOptional):
        return False
    if isinstance(action, Reduce) and action.scope == "model":
        return False
    adapters = all(expert.base is not None for expert in section.experts)
    return adapters and all(entry.same_bytes(base) for entry in experts)
