"""Routes of tensors: which way a merge takes where experts are adapters, and by which tensors that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pymerge.architecture.roles import Role
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import listed
from pymerge.errors import ArgumentError
from pymerge.methods.actions import WHOLE_MODEL, Action, InCore, Solve
from pymerge.planner import pieces

# "core": solved in the space of all factors, and added to the base's rows. "tiles": on rows, those of adapters made as
# they are read. "dense": on whole matrices.
Route = Literal["core", "tiles", "dense"]

# Operations of the dense form for one of the core's, where both take as long together with what comes before.
_DENSE_MORE = 4


def routed(action: Action, role: Role, base: TensorEntry, experts: Sequence[TensorEntry]) -> Action:
    """The action, or the same in the core: where all task vectors are known by factors, and that costs less, or the
    method is defined by them. A weight that nobody has touched is left to others.

    Raises ArgumentError for a solver that needs the factors of all weights, where there are none, or cannot solve
    matrices of this shape.
    """
    if isinstance(action, Solve) and role.solvable:
        rows, columns = pieces.worked_shape(role, action, base.shape)
        action.check_shape((rows, columns), len(experts))
    found = _in_core(action, role, base, experts)
    if isinstance(found, Solve) and found.of_model:
        raise ArgumentError(WHOLE_MODEL)
    return found


def _in_core(action: Action, role: Role, base: TensorEntry, experts: Sequence[TensorEntry]) -> Action:
    if not isinstance(action, Solve) or not action.has_core or (action.needs_outputs and role.in_axis == 0):
        return action
    if role.parts > 1 and not role.stacked:  # rows of the parts are not told apart there
        return action
    from pymerge.adapters.ranks import rank_over

    rank = 0
    for entry in experts:
        own = rank_over(base, entry)
        if own is None:
            return action
        rank += own
    shape = pieces.worked_shape(role, action, base.shape)
    core = InCore(action, (shape[0], shape[1]), rank)
    takes = rank > 0 and (action.minds_factors or _costs_less(core, action, len(experts)))
    return core if takes else action


def _costs_less(core: InCore, dense: Solve, experts: int) -> bool:
    """Whether a matrix is solved sooner by its factors; timed, they were whenever this says so, or nearly as soon.

    What is dense has more to do than is counted: all experts are made of their factors before, and PyTorch is imported.
    """
    beside = dense.core_flops(core.shape, core.rank)
    return (core.flops(core.shape, experts) - beside) / _DENSE_MORE + beside <= dense.flops(core.shape, experts)


def remarks(actions: Iterable[tuple[str, Action]]) -> list[str]:
    """Remarks for users on merges in the core, from all tensors' names and actions: each kind of remark once."""
    found: dict[str, list[str]] = {}
    for name, action in actions:
        if isinstance(action, InCore) and (remark := action.solve.core_remark(action.shape, action.rank)):
            found.setdefault(remark, []).append(name)
    return [f"{listed(names)}: {remark}" for remark, names in found.items()]


def route_of(action: Action) -> Route:
    """The way that an action takes."""
    return "core" if isinstance(action, InCore) else "dense" if isinstance(action, Solve) else "tiles"
