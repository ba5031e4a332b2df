"""Facts that all layers of a model tell before one is merged in memory: norms of what is added, thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.common.arrays import as_tensor
from pymerge.engine.measuring import measuring, square_of, with_scales
from pymerge.engine.trimming import with_thresholds
from pymerge.engine.whole import in_pieces
from pymerge.live.evaluate import Evaluator
from pymerge.methods.rows import Rows
from pymerge.planner.steps import Step


def trimmed(evaluator: Evaluator, decided: Sequence[tuple[Step, ...]]) -> Sequence[Step]:
    """Steps of all weights, with thresholds where these are of all of them."""
    steps = [step for own in decided for step in own]
    return with_thresholds(steps, evaluator.runner(torch.device("cpu")), lambda step: _rows(evaluator, step))


def informed(evaluator: Evaluator, decided: Sequence[tuple[Step, ...]]) -> list[tuple[Step, ...]]:
    """Steps of weights, with thresholds and scales of layers where these follow from all of them."""
    known = trimmed(evaluator, decided)
    squares = {}
    for step in measuring(known):
        made = torch.empty(step.shape, dtype=torch.float64, device=evaluator.device_of(step))
        evaluator.merge(step, made)
        squares[step.name] = square_of(made.cpu().numpy(), step.role)
    rest = iter(with_scales(known, squares) if squares else known)
    return [tuple(next(rest) for _ in own) for own in decided]


def _rows(evaluator: Evaluator, step: Step) -> list[Rows]:
    """The tensors of a step on the CPU."""
    rows = evaluator.checked_rows(step)
    base, *experts = (as_tensor(tensor).cpu() for tensor in (rows.base, *rows.experts))
    return in_pieces(Rows(base, experts, rows.out_dtype))
