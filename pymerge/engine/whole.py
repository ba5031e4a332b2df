"""Whole tensors that are in memory, merged as files are, whose sums are rounded the same. Imports PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.architecture.roles import Role
from pymerge.common.arrays import as_tensor, join
from pymerge.engine.matrices import solve
from pymerge.engine.torch_worker import merge_rows
from pymerge.methods.actions import Action, Run, Solve
from pymerge.methods.reduce import Reduce, Reduction, ranges
from pymerge.methods.rows import Rows
from pymerge.planner import pieces


class Share(NamedTuple):
    """A tensor's part in a reduction of several tensors: its state, and the number of the tensor's first element."""

    state: Reduction
    first: int


def merge_whole(action: Action, role: Role, run: Run, rows: Rows, share: Share | None = None) -> Tensor:
    """The merged tensor, in the memory that `rows` may have for it if its rows are independent.

    Args:
        rows: all rows of base and experts, on the device of `run`.
        share: of a tensor that is merged by what several together tell.
    """
    if share is not None:
        return as_tensor(join([share.state.merge(run, piece) for piece in in_pieces(rows, share.first)]))
    if not isinstance(action, Solve):
        return merge_rows(action, run, rows)
    base, experts = as_tensor(rows.base), [as_tensor(expert) for expert in rows.experts]
    merged: list[Tensor] = []
    for piece in pieces.split(role, action, rows.shape, max_elements=max(1, rows.numel)):
        part = slice(piece.start, piece.stop)
        tasks = [expert[part] for expert in experts] if rows.shape else experts
        merged += solve(action, role, run, [base[part] if rows.shape else base], [tasks], rows.out_dtype)
    return merged[0] if len(merged) == 1 else torch.cat(merged)


def in_pieces(whole: Rows, first: int = 0) -> list[Rows]:
    """The pieces in which a tensor is reduced that begins at element `first` of several."""
    whole = Rows(whole.base, whole.experts, whole.out_dtype, first, whole.row)
    several = ranges(whole.shape)
    return [whole.cut(*rows) for rows in several] if len(several) > 1 else [whole]


def reduce_together(
    action: Reduce, run: Run, sizes: Sequence[int], experts: int, load: Sequence[Callable[[], Rows]]
) -> list[Share]:
    """States of reductions over several tensors together, for each of them.

    Args:
        sizes: elements of each tensor, in the order of their names: of equal elements the first are taken.
        load: for each tensor what gives all of its rows, once in every pass.
    """
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    state = action.start((sum(sizes),), experts)
    for _ in range(state.passes):
        for number, first in enumerate(firsts):
            for rows in in_pieces(load[number](), first):
                state.add(rows.first, state.map(run, rows))
        state.end_pass()
    return [Share(state, first) for first in firsts]
