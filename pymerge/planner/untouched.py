"""Tensors of adapters that need not be merged one by one: those that none changes, and weighted sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.methods.actions import Action, Combine
from pymerge.methods.base import BaseOptional, Method
from pymerge.methods.delta import SolveTrimmedByAll
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
    if isinstance(action, SolveTrimmedByAll) and action.kept_of_all is not None:
        return False
    adapters = all(expert.base is not None for expert in section.experts)
    return adapters and all(entry.same_bytes(base) for entry in experts)


def one_sum(
    action: Action, base: TensorEntry, experts: Sequence[TensorEntry]
) -> tuple[Action, tuple[TensorEntry, ...]] | None:
    """A weighted sum of adapters of this base as a tensor that is taken as it is read; None for anything else.

    An average of models is one, if its weights add up to 1.
    """
    if not isinstance(action, Combine) or not action.weights or not any(entry.adapter_parts for entry in experts):
        return None
    whole = math.fsum(action.weights) / action.divisor
    if not action.on_base and not math.isclose(whole, 1.0, rel_tol=1e-12):
        return None
    from pymerge.adapters.summed import summed

    entry = summed(base, experts, [weight / action.divisor for weight in action.weights])
    return None if entry is None else (replace(action, weights=(), divisor=1.0, on_base=False), (entry,))
