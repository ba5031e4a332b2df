"""Advice that headers cannot give: on the size of deltas, from a few rows of each tensor that a method asks about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows read of each tensor: their root mean square is within some percent of the tensor's.
_ROWS = 4
# Names listed in a warning.
_NAMES = 3


def delta_warnings(plan: Plan) -> tuple[str, ...]:
    """One warning for each remark that methods make on the size of the deltas they would get (`Action.remark`).

    Reads at most 4 rows of the base and of each expert, and only of tensors whose action asks for it. Raises
    CheckpointError if a file cannot be read.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    steps = [step for step in plan.steps if step.action.minds_delta_size]
    with Reader(plan.inputs.stamps) as reader:
        for step in steps:
            rms = delta_rms(step, reader)
            remark = step.action.remark(rms)
            if remark is not None:
                found.setdefault(remark, []).append((rms, step.name))
    return tuple(_warning(remark, tensors, len(steps)) for remark, tensors in sorted(found.items()))


def delta_rms(step: Step, reader: Reader) -> float:
    """Root mean square of the deltas of the experts that touched the tensor, from a few rows; 0 if none did.

    NaN where a row holds NaN or infinity.
    """
    import numpy as np

    from pymerge.adapters.products import as_array

    def sampled(entry: TensorEntry) -> list[NDArray[Any]]:
        return [as_array(reader.read_bytes(entry, row, row + 1), entry.dtype, np.float64) for row in rows]

    squares = []
    rows = list(_sample(step.shape[0]))
    origin = sampled(step.base)
    for entry in step.experts:
        with np.errstate(invalid="ignore", over="ignore"):
            deltas = [row - base for row, base in zip(sampled(entry), origin, strict=True)]
            squares.append(float(np.square(deltas).mean()) if deltas else 0.0)
    touched = [square for square in squares if square != 0.0]
    return math.sqrt(sum(touched) / len(touched)) if touched else 0.0


def _sample(rows: int) -> Iterator[int]:
    count = min(rows, _ROWS)
    return (rows * index // count for index in range(count))


def _warning(remark: str, tensors: list[tuple[float, str]], asked: int) -> str:
    sizes = [rms for rms, _ in tensors]
    names = ", ".join(repr(name) for _, name in tensors[:_NAMES])
    more = f" and {len(tensors) - _NAMES} more" if len(tensors) > _NAMES else ""
    return (
        f"{len(tensors)} of {asked} tensors that are solved ({names}{more}) have deltas with a root mean square of "
        f"{min(sizes):.1e} to {max(sizes):.1e}: {remark}"
    )
