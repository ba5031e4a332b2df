"""How one tensor is worked on: whole, matrix by matrix of a stack, or in row ranges; d_out x d_in for solvers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.architecture.roles import Layer
from pymerge.methods import reduce
from pymerge.methods.base import Action, Cost, OpRunner

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A product below this takes less than a millisecond: waiting for other threads costs more than they give, and small
# float64 products round differently for each number of them.
_ONE_THREAD_FLOPS = 2**25


@dataclass(frozen=True)
class Piece:
    """Rows start to stop along the first axis of a stored tensor; `shape` is that of the piece."""

    start: int
    stop: int
    shape: tuple[int, ...]


def split(layer: Layer, action: Action, shape: tuple[int, ...], max_elements: int) -> list[Piece]:
    """The pieces of a tensor, in order. Actions that need whole matrices get them; others at most `max_elements`
    elements (but at least one row)."""
    if not shape or shape[0] == 0:
        return [smallest(layer, action, shape)]
    rows = shape[0]
    least = smallest(layer, action, shape).stop
    step = max(least, min(rows, max_elements // max(1, math.prod(shape[1:])))) if action.chunkable else least
    return [
        Piece(start, min(start + step, rows), (min(step, rows - start), *shape[1:])) for start in range(0, rows, step)
    ]


def smallest(layer: Layer, action: Action, shape: tuple[int, ...]) -> Piece:
    """The first of the smallest pieces that the action can work on: one row, one matrix of a stack, or all."""
    if not shape or shape[0] == 0:
        return Piece(0, shape[0] if shape else 1, shape)
    rows = 1 if action.chunkable or (layer.stacked and action.takes_matrices) else shape[0]
    return Piece(0, rows, (rows, *shape[1:]))


def ranges(shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of a tensor that is reduced before it is merged, by its shape alone."""
    return tuple(Piece(start, stop, (stop - start, *shape[1:])) for start, stop in reduce.ranges(shape) if shape)


def halves(action: Action, piece: Piece) -> list[Piece]:
    """The piece as two row ranges if the action may run on them, else as it is."""
    rows = piece.stop - piece.start
    if not action.chunkable or not piece.shape or rows < 2:
        return [piece]
    middle = piece.start + rows // 2
    ranges = ((piece.start, middle), (middle, piece.stop))
    return [Piece(start, stop, (stop - start, *piece.shape[1:])) for start, stop in ranges]


def matrix_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int]:
    """(d_out, d_in) of a stored linear weight (of one matrix of a stack)."""
    rows, columns = shape[-2:]
    return (rows, columns) if layer.in_axis == 1 else (columns, rows)


def cost(layer: Layer, action: Action, piece: Piece, experts: int) -> Cost:
    """Flops and scratch bytes of one piece."""
    return action.cost(matrix_shape(layer, piece.shape) if action.takes_matrices else piece.shape, experts)


def run(
    action: Action,
    layer: Layer,
    run_op: OpRunner,
    base: Tensor,
    experts: Sequence[Tensor],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run an action on one piece as stored; the result has the stored layout, contiguous."""
    return run_batch(action, layer, run_op, [base], [experts], out_dtype)[0]


def run_batch(
    action: Action,
    layer: Layer,
    run_op: OpRunner,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    out_dtype: torch.dtype | None = None,
    room: Tensor | None = None,
) -> list[Tensor]:
    """`run` on L pieces of one shape, with dtypes as in `Action.run_batch`; each result is what the piece gives alone.

    `layer` stands for all: their `in_axis` and `stacked` are the same. Where one piece is given and the action is
    chunkable, `room` may hold the result.
    """
    if action.chunkable and room is not None and len(bases) == 1:
        return [action.run_into(room, run_op, bases[0], experts[0])]
    if not action.takes_matrices:
        return action.run_batch(run_op, bases, experts, out_dtype)
    if layer.stacked:
        bases, experts = [base[0] for base in bases], [[expert[0] for expert in tasks] for tasks in experts]
        merged = run_matrices(action, layer.in_axis, run_op, bases, experts, out_dtype)
        return [matrix.unsqueeze(0) for matrix in merged]
    return run_matrices(action, layer.in_axis, run_op, bases, experts, out_dtype)


def run_matrices(
    action: Action,
    in_axis: int,
    run_op: OpRunner,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Run an action on matrices whose input axis is `in_axis`; contiguous results in the same layout."""
    from pymerge.ops._op import one_thread

    def turned(matrix: Tensor) -> Tensor:
        return (matrix.mT if in_axis == 0 else matrix).contiguous()

    bases, experts = [turned(base) for base in bases], [[turned(expert) for expert in tasks] for tasks in experts]
    rows, columns = bases[0].shape
    with one_thread() if 2 * rows * columns**2 < _ONE_THREAD_FLOPS else nullcontext():
        merged = action.run_batch(run_op, bases, experts, out_dtype)
    return [matrix.mT.contiguous() for matrix in merged] if in_axis == 0 else merged
