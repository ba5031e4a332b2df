"""Keeping of whole linear weights for later merges, matrix by matrix, and merges by what is kept. Imports PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.architecture.roles import Role
from pymerge.common.arrays import as_tensor
from pymerge.engine.matrices import by_matrices, threads_for
from pymerge.methods.actions import Kept, Run, Solve
from pymerge.methods.rows import Rows
from pymerge.ops._precision import ieee_products
from pymerge.planner import pieces


def keep_whole(action: Solve, role: Role, run: Run, rows: Rows) -> list[Kept] | None:
    """Keep of all matrices of a weight, in their order; None if there is one of which nothing can be kept."""
    found: list[Kept | None] = []

    def keep(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], code: str) -> list[Tensor]:
        for base, tasks in zip(bases, experts, strict=True):
            with threads_for(base), ieee_products(base.device.type):
                found.append(action.keep(run, base, tasks))
        return list(bases)

    for part in _matrices(action, role, rows.shape):
        base, experts = as_tensor(rows.base)[part], [as_tensor(expert)[part] for expert in rows.experts]
        by_matrices(keep, role, [base], [experts], rows.out_dtype)
    kept = [each for each in found if each is not None]
    return kept if len(kept) == len(found) else None


def merge_kept(kept: Sequence[Kept], action: Solve, role: Role, base: Tensor, out_dtype: str) -> Tensor:
    """The merged weight, by what is kept of its matrices."""
    rest = iter(kept)

    def merge(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], code: str) -> list[Tensor]:
        merged = []
        for matrix in bases:
            with threads_for(matrix), ieee_products(matrix.device.type):
                merged.append(next(rest).merge(action, matrix, code))
        return merged

    parts = [by_matrices(merge, role, [base[part]], [[]], out_dtype) for part in _matrices(action, role, base.shape)]
    merged = [tensor for part in parts for tensor in part]
    return merged[0] if len(merged) == 1 else torch.cat(merged)


def _matrices(action: Solve, role: Role, shape: Sequence[int]) -> list[slice]:
    split = pieces.split(role, action, tuple(shape), max_elements=1)
    return [slice(piece.start, piece.stop) for piece in split]
