"""KnOTS and Core Space: task vectors in a basis that all share, from their factors: here tensors of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Merge = Callable[[Sequence[Tensor]], Tensor]


class Sides(NamedTuple):
    """left @ right: a task vector B A, or the X of a merge."""

    left: Tensor
    right: Tensor


def one_sided(tasks: Sequence[Sides], cutoff: float, absolute: bool, merge: Merge) -> Sides:
    """KnOTS: X = U merge(Z_1 .. Z_T) with [tau_1 .. tau_T] = U diag(s) V^T and Z_t = diag(s) V_t.

    From a core: Q_B R_B diag(R_1^T .. R_T^T) with [B_1 .. B_T] = Q_B R_B and A_t^T = Q_t R_t. Only s above `cutoff`,
    times the largest unless `absolute`, are taken.
    """
    d_out, d_in = len(tasks[0].left), tasks[0].right.shape[1]
    basis, R = torch.linalg.qr(torch.cat([task.left for task in tasks], dim=1))
    sides = [torch.linalg.qr(task.right.mT) for task in tasks]
    parts = R.split([len(task.right) for task in tasks], dim=1)
    core = torch.cat([part @ side.R.mT for part, side in zip(parts, sides, strict=True)], dim=1)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    count = int((s > (cutoff if absolute else cutoff * s[:1].sum())).sum())
    if count == 0:
        return Sides(core.new_zeros(d_out, 0), core.new_zeros(0, d_in))
    U, signs = _signed(basis @ u[:, :count])
    right = (s[:count] * signs)[:, None] * vh[:count]
    blocks = right.split([side.Q.shape[1] for side in sides], dim=1)
    return Sides(U, merge([block @ side.Q.mT for block, side in zip(blocks, sides, strict=True)]))


def two_sided(tasks: Sequence[Sides], merge: Merge) -> Sides:
    """Core Space: X = U merge(M_1 .. M_T) V^T, M_t = U^T B_t A_t V, so that tau_t = U M_t V^T.

    U are the left singular vectors of [B_1 .. B_T], V the right ones of the A_t under each other, R x d_in.
    """
    U = _left_vectors(torch.cat([task.left for task in tasks], dim=1))
    V = _left_vectors(torch.cat([task.right for task in tasks]).mT)
    cores = [(U.mT @ task.left) @ (task.right @ V) for task in tasks]
    return Sides(U, merge(cores) @ V.mT)


def balanced(tau: Tensor) -> Sides:
    """The factors of any task vector by its singular values, the square root of each on either side."""
    U, s, Vh = torch.linalg.svd(tau, full_matrices=False)
    kept = s > torch.finfo(s.dtype).eps * math.sqrt(max(tau.shape)) * s[:1].sum()
    roots = s[kept].sqrt()
    return Sides(U[:, kept] * roots, roots[:, None] * Vh[kept])


def _left_vectors(M: Tensor) -> Tensor:
    """Left singular vectors of a matrix, by way of its QR factors."""
    basis, R = torch.linalg.qr(M)
    return _signed(basis @ torch.linalg.svd(R, full_matrices=False)[0])[0]


def _signed(U: Tensor) -> tuple[Tensor, Tensor]:
    """Columns whose largest element is positive, and the signs that they were multiplied with."""
    signs = torch.where(U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0] < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, signs
