"""Advice that headers cannot give: on the size of deltas, from a few rows of each tensor that a method asks about."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

# Rows read of each tensor: their root mean square is within some percent of the tensor's.
_ROWS = 4
_BLOCK = 2**18  # elements that are compared at once
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
            squares = delta_squares(step, reader)
            rms = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
            matrix = math.prod(step.shape[1:] if step.role.stacked else step.shape) // step.role.parts
            remark = step.action.remark(rms, [square * matrix for square in squares])
            if remark is not None:
                found.setdefault(remark, []).append((rms, step.name))
    return tuple(_warning(remark, tensors, len(steps)) for remark, tensors in sorted(found.items()))


def delta_squares(step: Step, reader: Reader) -> list[float]:
    """Mean square of the delta of each expert that touched the tensor, from a few rows.

    NaN where a row holds NaN or infinity.
    """
    rows = list(_sample(step.shape[0]))
    totals = [0.0] * len(step.experts)
    for row in rows:
        origin = reader.read_bytes(step.base, row, row + 1)
        for number, entry in enumerate(step.experts):
            totals[number] += _squares(reader.read_bytes(entry, row, row + 1), entry.dtype, origin, step.base.dtype)
    elements = len(rows) * math.prod(step.shape[1:])
    return [total / elements for total in totals if total != 0.0]


def _squares(values: bytearray, dtype: str, origin: bytearray, base_dtype: str) -> float:
    """Sum of the squared differences, a block at a time: a row of a stack is a matrix, and in float64 four times it."""
    import numpy as np

    from pymerge.adapters.products import as_array

    total, size, base_size = 0.0, ITEM_SIZES[dtype], ITEM_SIZES[base_dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(values) // size, _BLOCK):
            stop = start + _BLOCK
            some = as_array(values[start * size : stop * size], dtype, np.float64)
            base = as_array(origin[start * base_size : stop * base_size], base_dtype, np.float64)
            total += float(np.square(some - base).sum())
    return total


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
