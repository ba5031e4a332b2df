"""Geometry of pieces: row ranges of a stored tensor, whole tensors, matrices of a stack; d_out x d_in for solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pymerge.architecture.roles import Role
from pymerge.methods import reduce
from pymerge.methods.actions import TILE_ELEMENTS, TILE_ROWS, Action, Combine, Elementwise, InCore, Solve
from pymerge.methods.finish import Finish

# Elements of the row ranges of a weight that is solved by its factors. The ranges follow from its shape alone: products
# may round differently where they have other numbers of rows.
_CORE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Piece:
    """Rows start to stop along the first axis of a stored tensor; `shape` is that of the piece."""

    start: int
    stop: int
    shape: tuple[int, ...]


def by_rows(action: Action) -> bool:
    """Whether rows are independent of each other, so that the action may run on any of them."""
    return isinstance(action, (Combine, Elementwise))


def split(role: Role, action: Action, shape: tuple[int, ...], max_elements: int) -> list[Piece]:
    """The pieces of a tensor, in order: of at most `max_elements` elements (but at least one row) where rows are
    independent, else as `smallest` says."""
    if not shape or shape[0] == 0:
        return [smallest(role, action, shape)]
    rows = shape[0]
    least = smallest(role, action, shape).stop
    step = max(least, min(rows, max_elements // max(1, math.prod(shape[1:])))) if by_rows(action) else least
    return [
        Piece(start, min(start + step, rows), (min(step, rows - start), *shape[1:])) for start in range(0, rows, step)
    ]


def smallest(role: Role, action: Action, shape: tuple[int, ...]) -> Piece:
    """The first of the smallest pieces that the action can work on: one row, rows that are added to, one matrix of a
    stack, or all."""
    if not shape or shape[0] == 0:
        return Piece(0, shape[0] if shape else 1, shape)
    rows = 1 if by_rows(action) or (role.stacked and _one_by_one(action)) else shape[0]
    if isinstance(action, InCore):
        rows = min(rows, max(1, _CORE_ELEMENTS // max(1, math.prod(shape[1:]))))
    return Piece(0, rows, (rows, *shape[1:]))


def _one_by_one(action: Action) -> bool:
    """Whether each matrix of a stack is worked on by itself."""
    return isinstance(action, InCore) or (
        isinstance(action, Solve) and not (isinstance(action, Finish) and action.takes_stacks)
    )


def beside(action: Action, numel: int, experts: int) -> int:
    """Bytes that a piece of so many elements takes beside what its matrices do."""
    return action.beside(numel, experts) if isinstance(action, Finish) else 0


def rows_at_once(role: Role, shape: tuple[int, ...]) -> int:
    """Rows of a weight that is solved by its factors that are read, added to and looked at together: matrices of a
    stack one by one. They follow from its shape alone, as `_CORE_ELEMENTS` does."""
    return 1 if role.stacked else max(TILE_ROWS, TILE_ELEMENTS // max(1, math.prod(shape[1:])))


def ranges(shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of a tensor that is reduced before it is merged, by its shape alone."""
    return tuple(Piece(start, stop, (stop - start, *shape[1:])) for start, stop in reduce.ranges(shape) if shape)


def halves(action: Action, piece: Piece) -> list[Piece]:
    """The piece as two row ranges if rows are independent, else as it is."""
    rows = piece.stop - piece.start
    if not by_rows(action) or not piece.shape or rows < 2:
        return [piece]
    middle = piece.start + rows // 2
    return [
        Piece(start, stop, (stop - start, *piece.shape[1:]))
        for start, stop in ((piece.start, middle), (middle, piece.stop))
    ]


def worked_shape(role: Role, action: Action, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an action is given of a stored one: (d_out, d_in) of linear weights for solvers, of each of its
    parts; else as it is."""
    if not isinstance(action, Solve) or not role.solvable:
        return shape
    rows, columns = shape[-2:] if role.in_axis == 1 else (shape[-1], shape[-2])
    return rows // role.parts, columns
