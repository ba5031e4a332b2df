"""mergekit's planner with pymerge for merges in memory, as evolve makes them. Imports mergekit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.graph import Task
from mergekit.io.tasks import ReturnTensor
from mergekit.plan import MergePlanner
from torch import Tensor

from pymerge.integrations.mergekit.configs import document_of
from pymerge.integrations.mergekit.merges import plan_document
from pymerge.integrations.mergekit.options import Options
from pymerge.live.planned import merge_in_memory

Tensors = dict[str, Tensor]


class _Merge(Task[Any]):
    """The whole merge. Carried out once, by whatever carries out mergekit's tasks."""

    merge: Callable[[], Tensors]

    def arguments(self) -> dict[str, Task[Any]]:
        return {}

    def execute(self, **_: Any) -> Tensors:
        return self.merge()


class _Merged(Task[Tensor]):
    """One tensor of a merge, which is handed over, not kept."""

    name: str
    merge: _Merge

    def arguments(self) -> dict[str, Task[Any]]:
        return {"merged": self.merge}

    def execute(self, merged: Tensors, **_: Any) -> Tensor:
        return merged.pop(self.name)


class InMemoryPlanner(MergePlanner):
    """mergekit's planner, whose merges in memory are pymerge's, with all tensors that the models have.

    Merges to the disk that it plans stay mergekit's.
    """

    lenient = False

    def plan_in_memory(self) -> list[ReturnTensor]:
        """Tasks for mergekit's executor, one for each tensor. Raises PymergeError for what cannot be merged."""
        own = Options(**{field.name: getattr(self.options, field.name) for field in fields(Options)})
        plan = plan_document(document_of(self.config, None, lenient=self.lenient), own)
        whole = _Merge(merge=lambda: merge_in_memory(plan))
        return [
            ReturnTensor(weight_info=WeightInfo(name=tensor.name), tensor_task=_Merged(name=tensor.name, merge=whole))
            for layout in plan.layouts
            for tensor in layout.tensors
        ]
