"""Merges by several parameters at once: of each weight all are made before the next is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymerge.adapters.summed import is_sum
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import as_tensor
from pymerge.engine.torch_worker import merge_rows
from pymerge.engine.whole import Share
from pymerge.live.evaluate import Evaluator
from pymerge.live.write import Decided, new_tensor, rows_in, write
from pymerge.methods.actions import InCore
from pymerge.planner.pieces import by_rows
from pymerge.planner.steps import Step

# Elements of rows that are merged by several parameters before the next ones are read.
_CACHED_ELEMENTS = 2**16


def merge_group(evaluator: Evaluator, decided: Sequence[Sequence[Decided]]) -> list[dict[str, Tensor]]:
    """New tensors by name for each of several parameters, given what is decided on each weight by them."""
    merged: list[dict[str, Tensor]] = [{} for _ in decided]
    for weight in zip(*decided, strict=True):
        outs = [new_tensor(steps) for steps, _ in weight]
        if len({_form(steps) for steps, _ in weight}) == 1:
            for number in range(len(weight[0].steps)):
                steps = [each.steps[number] for each in weight]
                shares = [each.shares.get(id(step)) for step, each in zip(steps, weight, strict=True)]
                rows = [rows_in(out, step, each.steps) for out, step, each in zip(outs, steps, weight, strict=True)]
                _merge_rows(evaluator, steps, rows, shares)
        else:  # some parameters make a copy of it
            for out, (own, shares_of) in zip(outs, weight, strict=True):
                write(evaluator, own, shares_of, out)
        for tensors, out, (own, _) in zip(merged, outs, weight, strict=True):
            tensors[own[0].name] = out
    return merged


def _form(steps: Sequence[Step]) -> tuple[Any, ...]:
    """Features that are the same in steps which read the same."""
    return tuple((step.offset, step.shape, len(step.experts)) for step in steps)


def _merge_rows(
    evaluator: Evaluator, steps: Sequence[Step], outs: Sequence[Tensor], shares: Sequence[Share | None]
) -> None:
    """Merge the same rows by several parameters: of files they are read once.

    Where rows are independent, a few at a time, which stay in the processor's cache.
    """
    entries = {entry: step for step in steps for entry in _stored(step)}
    device = evaluator.device_of(steps[0])
    evaluator.once = {entry: evaluator.input_of(step, entry, device) for entry, step in entries.items()}
    try:
        if steps[0].shape and all(by_rows(each.action) and not any(map(is_sum, each.inputs)) for each in steps):
            _by_rows(evaluator, steps, outs)
            return
        for step, out, share in zip(steps, outs, shares, strict=True):
            evaluator.merge(step, out, share)
    finally:
        evaluator.once = {}


def _stored(step: Step) -> Sequence[TensorEntry]:
    """Inputs that are read, and are the same for all parameters."""
    if isinstance(step.action, InCore):
        return ()
    return [entry for entry in step.inputs if not isinstance(entry, HeldEntry) and not is_sum(entry)]


def _by_rows(evaluator: Evaluator, steps: Sequence[Step], outs: Sequence[Tensor]) -> None:
    height = max(1, _CACHED_ELEMENTS // max(1, math.prod(steps[0].shape[1:])))
    made = [evaluator.checked_rows(step, out) for step, out in zip(steps, outs, strict=True)]
    rooms = [
        torch.empty_like(out) if rows.out is None else as_tensor(rows.out) for rows, out in zip(made, outs, strict=True)
    ]
    run = evaluator.runner(evaluator.device_of(steps[0]))
    for start in range(0, steps[0].shape[0], height):
        for step, rows, room in zip(steps, made, rooms, strict=True):
            part = room[start : start + height]
            piece = rows.cut(start, start + len(part))
            found = merge_rows(step.action, run, piece if rows.out is None else replace(piece, out=part))
            if found.data_ptr() != part.data_ptr():
                part.copy_(found)
    for step, room, out in zip(steps, rooms, outs, strict=True):
        evaluator.accept(step, room, out)
