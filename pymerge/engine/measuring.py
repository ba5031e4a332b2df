"""Norms of what a merge adds to each layer, known before any is written: a pass over the plan of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.architecture.roles import Role
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.events import event
from pymerge.common.files import install, os_errors, parse_json_object, read_text_file
from pymerge.engine.executor import Executor
from pymerge.engine.trimming import rows_of, with_thresholds
from pymerge.engine.worker import Context
from pymerge.methods.finish import Finish, scales
from pymerge.output.files import WORK_FOLDER
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.output.work import NORMS_NAME, temporary
from pymerge.planner.budget import Budget
from pymerge.planner.jobs import batches
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_DTYPE = "F64"


def measuring(steps: Sequence[Step]) -> list[Step]:
    """Steps that give what is added to the layers whose norms are wanted, in float64."""
    return [
        replace(step, action=step.action.measuring(), dtype=_DTYPE, nbytes=math.prod(step.shape) * ITEM_SIZES[_DTYPE])
        for step in steps
        if isinstance(step.action, Finish) and step.action.measured
    ]


def with_scales(steps: Sequence[Step], squares: Mapping[str, float]) -> list[Step]:
    """The steps with the scales that follow from the squared norms of their layers."""
    layers = {
        step.name: (step.action, squares[step.name])
        for step in steps
        if isinstance(step.action, Finish) and step.action.measured
    }
    found = scales(layers)
    return [
        replace(step, action=layers[step.name][0].scaled_by(found[step.name])) if step.name in layers else step
        for step in steps
    ]


def measured(
    steps: Sequence[Step], budget: Budget, context: Context, threads: int, folder: Path | None = None
) -> Sequence[Step]:
    """The steps of a plan with what all of them tell: thresholds, and scales of layers, which are measured. The very
    steps, where there is nothing to tell.

    Args:
        context: its progress has been told of `measuring(steps)`.
        folder: an output directory that this merge holds, in whose work folder the norms stay for later runs.
    """
    reader = context.reader
    # What is read here is on the CPU, whatever the device is.
    run = context.run if context.run.device.type == "cpu" else Runner()
    steps = with_thresholds(steps, run, lambda step: rows_of(step, reader))
    wanted = measuring(steps)
    if not wanted:
        return steps
    path = None if folder is None else folder / WORK_FOLDER / NORMS_NAME
    squares = None if path is None else _read(path, [step.name for step in wanted])
    if squares is None:
        sink = Norms(wanted)
        Executor(context, sink, threads).run(batches(wanted, budget, threads=threads), budget.tensors)
        squares = sink.squares
        event("measured", f"measured the norms of {len(squares)} layers", layers=len(squares))
        if path is not None:
            install((json.dumps(squares) + "\n").encode(), path, temporary(path.parent))
    return with_scales(steps, squares)


class Norms:
    """Sink that adds up the squares of what steps of `measuring` give."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._sizes = {step.name: _matrix(step.shape, step.role) for step in steps}
        self._sums: dict[str, list[float]] = {step.name: [] for step in steps}

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Take the next matrices of a tensor; nothing is left to do."""
        import numpy as np

        flat = np.frombuffer(data, np.float64) if isinstance(data, memoryview) else data.reshape(-1).numpy()
        self._sums[tensor_name] += squares_of(flat, self._sizes[tensor_name])
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; none is written."""

    @property
    def squares(self) -> dict[str, float]:
        """The squared norm of each tensor."""
        return {name: math.fsum(sums) for name, sums in self._sums.items()}


def square_of(values: NDArray[np.float64], role: Role) -> float:
    """The squared norm of a whole tensor, rounded as from pieces."""
    return math.fsum(squares_of(values.reshape(-1), _matrix(values.shape, role)))


def squares_of(flat: NDArray[np.float64], size: int) -> Iterator[float]:
    """The squared norms of matrices of so many elements."""
    import numpy as np

    return (float(np.square(flat[start : start + size]).sum()) for start in range(0, len(flat), max(1, size)))


def _matrix(shape: Sequence[int], role: Role) -> int:
    """Elements of one matrix of a layer."""
    return math.prod(shape[1:] if role.stacked else shape)


def _read(path: Path, names: Sequence[str]) -> dict[str, float] | None:
    """Squared norms that an earlier run has left; None if they are not there, or are not of these tensors."""
    with os_errors(path, "reading"):
        if not path.exists():
            return None
        try:
            found = parse_json_object(read_text_file(path), unique=True)
        except ValueError:
            return None
    sound = found.keys() == set(names) and all(isinstance(each, float) for each in found.values())
    return found if sound else None
