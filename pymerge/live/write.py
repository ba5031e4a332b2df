"""Merged tensors written: to new memory, or to what is overwritten in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.checkpoint.held import HeldEntry
from pymerge.common.dtypes import torch_dtype
from pymerge.common.names import listed
from pymerge.engine.whole import Share
from pymerge.errors import PymergeError
from pymerge.live.evaluate import Evaluator
from pymerge.live.targets import WeightTarget, backup, restore
from pymerge.planner.steps import Step


class Decided(NamedTuple):
    """Decision on a weight: its steps, and the shares, by ids of steps, of those that have one."""

    steps: Sequence[Step]
    shares: Mapping[int, Share]


def new_tensor(steps: Sequence[Step]) -> Tensor:
    """Memory for a merged tensor, where the base has it."""
    step, base = steps[0], steps[0].base
    shape = (sum(each.shape[0] for each in steps), *step.shape[1:]) if len(steps) > 1 else step.shape
    place = base.tensor.device if isinstance(base, HeldEntry) else torch.device("cpu")
    return torch.empty(shape, dtype=torch_dtype(step.dtype), device=place)


def in_dtype(step: Step, dtype: str) -> Step:
    """The step for a result in this dtype."""
    return step if step.dtype == dtype else replace(step, dtype=dtype)


def rows_in(out: Tensor, step: Step, steps: Sequence[Step]) -> Tensor:
    """The rows of a weight that one of its steps makes."""
    return out if len(steps) == 1 else out[step.offset : step.offset + step.shape[0]]


def write(evaluator: Evaluator, steps: Sequence[Step], shares: Mapping[int, Share], out: Tensor) -> None:
    """Merge all rows of a weight."""
    for step in steps:
        evaluator.merge(step, rows_in(out, step, steps), shares.get(id(step)))


def overwrite(evaluator: Evaluator, targets: Sequence[WeightTarget], decided: Iterable[Decided], atomic: bool) -> None:
    """Overwrite targets one after the other; on an error all are written back if it is `atomic`.

    Otherwise the error says which are overwritten.
    """
    kept = backup(targets) if atomic else None
    done: list[str] = []
    try:
        for target, (steps, shares) in zip(targets, decided, strict=True):
            _overwrite_one(evaluator, target, steps, shares)
            done.append(target.weight.name)
    except BaseException as error:
        if kept is not None:
            restore(targets, kept)
        elif isinstance(error, PymergeError):
            error.args = (f"{error}; {_overwritten(done)}",)
        raise


def _overwrite_one(
    evaluator: Evaluator, target: WeightTarget, steps: Sequence[Step], shares: Mapping[int, Share]
) -> None:
    if target.whole is not None:
        write(evaluator, steps, shares, target.whole)
        return
    place = target.places()[0].device
    merged = torch.empty(target.entry.shape, dtype=torch_dtype(target.dtype), device=place)
    write(evaluator, steps, shares, merged)
    target.write(merged)


def _overwritten(done: Sequence[str]) -> str:
    if not done:
        return "no other tensor is overwritten"
    return f"overwritten are {listed(done)}, and perhaps this one; the others are as they were"
