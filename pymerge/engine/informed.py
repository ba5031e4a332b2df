"""Facts that all tensors of a model in memory tell before one is merged: thresholds, and norms of what is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pymerge.architecture.roles import Role
from pymerge.common.arrays import compute_code
from pymerge.engine.measuring import square_of
from pymerge.engine.trimming import thresholds_of
from pymerge.engine.whole import in_pieces
from pymerge.methods.actions import Action, Run
from pymerge.methods.delta import SolveTrimmedByAll
from pymerge.methods.finish import Finish, scales
from pymerge.methods.rows import Rows


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor to be merged: W_0 and W_t, and the dtype of the result."""

    name: str
    role: Role
    action: Action | None
    base: Tensor
    experts: Sequence[Tensor]
    dtype: torch.dtype


def informed(
    tensors: Sequence[InMemory], run: Run, rows: Callable[[InMemory], Rows], finish: Callable[[InMemory], Tensor]
) -> list[InMemory]:
    """The tensors with actions that know what they must of all of them.

    Args:
        rows: gives all rows of a tensor.
        finish: merges a tensor.
    """
    return _scaled(_trimmed(tensors, run, rows), finish)


def _trimmed(tensors: Sequence[InMemory], run: Run, rows: Callable[[InMemory], Rows]) -> list[InMemory]:
    groups: dict[tuple[SolveTrimmedByAll, float], list[InMemory]] = {}
    for tensor in tensors:
        if isinstance(tensor.action, SolveTrimmedByAll) and (share := tensor.action.kept_of_all) is not None:
            groups.setdefault((tensor.action, share), []).append(tensor)
    known: dict[str, Action] = {}
    for (action, share), group in groups.items():
        numel = sum(tensor.base.numel() for tensor in group)
        loads = [lambda tensor=tensor: in_pieces(rows(tensor)) for tensor in group if tensor.base.numel()]
        double = any(compute_code(tensor.base, *tensor.experts) == "F64" for tensor in group)
        found = thresholds_of(run, loads, numel, share, len(group[0].experts), double=double)
        known |= {tensor.name: action.knowing(found) for tensor in group}
    return [replace(each, action=known.get(each.name, each.action)) for each in tensors]


def _scaled(tensors: Sequence[InMemory], finish: Callable[[InMemory], Tensor]) -> list[InMemory]:
    layers: dict[str, tuple[Finish, float]] = {}
    for tensor in tensors:
        if isinstance(tensor.action, Finish) and tensor.action.measured:
            bare = replace(tensor, action=tensor.action.measuring(), dtype=torch.float64)
            layers[tensor.name] = (tensor.action, square_of(finish(bare).cpu().numpy(), tensor.role))
    found = scales(layers)
    known = {name: action.scaled_by(found[name]) for name, (action, _) in layers.items()}
    return [replace(each, action=known.get(each.name, each.action)) for each in tensors]
