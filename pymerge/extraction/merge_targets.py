"""Targets of a merge of adapters, by what the merge makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pymerge.adapters.low_rank import low_rank_of
from pymerge.adapters.ranks import rank_over
from pymerge.architecture.roles import Kind
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.common.names import listed
from pymerge.errors import PlanError
from pymerge.extraction.targets import UNSTACKED, TensorPair, modules_with_modules, without_factors
from pymerge.extraction.tied import is_tied
from pymerge.methods.actions import Combine, InCore
from pymerge.planner.constants import reproduces
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

_LEFT = "changed by no product of factors: --full-tensors save"


@dataclass(frozen=True)
class Sorted:
    """Targets that a merge changes by `products` of factors, by `dense` matrices, which may be cut to factors, or as a
    `whole`."""

    products: Sequence[TensorPair]
    dense: Sequence[TensorPair]
    whole: Sequence[TensorPair]
    parents: set[str]  # modules that have others inside

    def whole_as(self, full_tensors: str) -> list[TensorPair]:
        """The targets that have no factors, with their places. Raises PlanError for those that have none."""
        if full_tensors == "save":
            adapted = {target.module for target in (*self.products, *self.dense) if target.form == "module"}
            found = [
                target if target.reason else without_factors(target, adapted, self.parents) for target in self.whole
            ]
        else:
            found = [replace(target, place="nowhere", reason=_LEFT) for target in self.whole]
        lost = [target.name for target in found if target.place == "nowhere"]
        if lost and full_tensors == "error":
            raise PlanError([f"{listed(lost)}: changed by no product of factors; give --full-tensors save, or skip"])
        if lost and full_tensors == "save":
            raise PlanError(
                [f"{listed(lost)}: parameters of no module that PEFT saves; give --full-tensors skip, or other inputs"]
            )
        return found


def sort(plan: Plan, targets: Sequence[TensorPair], steps: Mapping[str, Step], names: Iterable[str]) -> Sorted:
    """Sort the targets by what becomes of them; `names` are those of all tensors in memory."""
    files = {file for model in plan.inputs.experts if model.base is not None for file in model.files}
    products, dense, whole = [], [], []
    for target in targets:
        step = steps[target.name]
        if not _changes(step):
            continue
        if target.place != "factors" or _is_absolute(step, files) or (is_table(step) and is_tied(plan)):
            whole.append(_flat(target))
        elif why_dense(step, plan.method.name):
            dense.append(target)
        else:
            products.append(target)
    return Sorted(products, dense, whole, modules_with_modules(names))


def _changes(step: Step) -> bool:
    """Whether the merge may differ from the base: an adapter adds something, or the base is scaled."""
    scaled = isinstance(step.action, Combine) and not reproduces(step.action)
    return scaled or any(rank_over(step.base, entry) != 0 for entry in step.experts)


def _is_absolute(step: Step, files: set[Path]) -> bool:
    """Whether an adapter has a tensor, or rows of it, in place of the base's."""
    return any(_replaces(entry, files) for entry in step.experts if rank_over(step.base, entry) is None)


def _replaces(entry: TensorEntry, files: set[Path]) -> bool:
    return entry.file in files or (bool(entry.adapter_parts) and low_rank_of(entry) is None)


def is_table(step: Step) -> bool:
    return step.role.kind is Kind.EMBEDDING


def _flat(target: TensorPair) -> TensorPair:
    """The target as one matrix without factors."""
    shape = target.base.shape or (1,)
    own = replace(
        target, place="nowhere", form="module", shape=(shape[0], math.prod(shape[1:])), count=1, stacked=False, depth=0
    )
    reason = target.reason if target.reason == UNSTACKED else ""
    return replace(own, kernel=(), transposed=False, uniform=False, reason=reason)


def why_dense(step: Step, method: str) -> str:
    """Why the merge of a tensor is not a sum of products of factors; "" if it is."""
    if any(rank_over(step.base, entry) is None for entry in step.experts):
        return "of a model, absolute, or with DoRA in some input"
    action = step.action
    if isinstance(action, Combine):
        total = math.fsum(action.weights) / action.divisor
        scaled = f"its weights add up to {total:g}, so that the base is scaled"
        return scaled if action.weights else ""  # the plan has made one sum of all that is one
    if isinstance(action, InCore) and action.solve.needs_outputs:  # it goes row by row, and not in the factors' space
        return f"{method} leaves the space of the factors, in which wudi_flow, of the same loss, stays"
    if isinstance(action, InCore) and step.role.parts == 1:
        return ""
    return f"{method} does not give products of factors"
