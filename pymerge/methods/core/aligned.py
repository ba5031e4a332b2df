"""KnOTS and Core Space: task vectors in a basis that all share, from their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pymerge.methods.core.deltas import Product
from pymerge.methods.core.factors import Factors, split
from pymerge.methods.core.tall import Matrix, orthonormal


class Aligned(NamedTuple):
    """Task vectors in bases that they share: tau_t = left part_t right."""

    left: Matrix
    parts: Sequence[Matrix]  # of one shape
    right: Matrix | None  # None: the parts have all columns

    def merged(self, part: Matrix) -> Product:
        """X of what the parts are merged to."""
        return Product(self.left, part if self.right is None else part @ self.right)


def one_sided(tasks: Sequence[Factors], cutoff: float, absolute: bool) -> Aligned:
    """KnOTS: tau_t = U Z_t with [tau_1 .. tau_T] = U diag(s) V^T and Z_t = diag(s) V_t.

    From a core: Q_B R_B diag(R_1^T .. R_T^T) with [B_1 .. B_T] = Q_B R_B and A_t^T = Q_t R_t. Only s above `cutoff`,
    times the largest unless `absolute`, are taken.
    """
    tasks = [task.double for task in tasks]
    basis, R = orthonormal(np.concatenate([task.B for task in tasks], axis=1))
    rows, sides = zip(*(orthonormal(task.A.T) for task in tasks), strict=True)
    parts = split([len(task.A) for task in tasks], R, axis=1)
    core = np.concatenate([part @ side.T for part, side in zip(parts, sides, strict=True)], axis=1)
    u, s, vh = np.linalg.svd(core, full_matrices=False)
    count = int((s > (cutoff if absolute else cutoff * s[:1].sum())).sum())
    U, signs = _signed(basis @ u[:, :count])
    right = (s[:count] * signs)[:, None] * vh[:count]
    blocks = split([len(side) for side in sides], right, axis=1)
    return Aligned(U, [block @ Q.T for block, Q in zip(blocks, rows, strict=True)], None)


def two_sided(tasks: Sequence[Factors]) -> Aligned:
    """Core Space: tau_t = U M_t V^T, M_t = U^T B_t A_t V.

    U are the left singular vectors of [B_1 .. B_T], V the right ones of the A_t under each other, R x d_in.
    """
    tasks = [task.double for task in tasks]
    U = _left_vectors(np.concatenate([task.B for task in tasks], axis=1))
    V = _left_vectors(np.concatenate([task.A for task in tasks]).T)
    cores = [(U.T @ task.B) @ (task.A @ V) for task in tasks]
    return Aligned(U, cores, V.T)


def balanced(tau: Matrix) -> Factors:
    """The factors of any task vector by its singular values, the square root of each on either side."""
    U, s, Vh = np.linalg.svd(tau, full_matrices=False)
    kept = s > np.finfo(s.dtype).eps * math.sqrt(max(tau.shape)) * s[:1].sum()
    roots = np.sqrt(s[kept])
    return Factors(U[:, kept] * roots, roots[:, None] * Vh[kept])


def _left_vectors(M: Matrix) -> Matrix:
    """Left singular vectors of a matrix, by way of its QR factors."""
    basis, R = orthonormal(M)
    return _signed(basis @ np.linalg.svd(R, full_matrices=False)[0])[0]


def _signed(U: Matrix) -> tuple[Matrix, Matrix]:
    """Columns whose largest element is positive, and the signs that they were multiplied with."""
    if not U.size:
        return U, np.ones(U.shape[1])
    signs = np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1.0, 1.0)
    return U * signs, signs
