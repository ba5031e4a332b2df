"""KnOTS and Core Space: task vectors in a basis that all share, from their factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pymerge.methods.core.factors import Factors, Matrix, Product, nothing, orthonormal, split

Merge = Callable[[Sequence[Matrix]], Matrix]


def one_sided(tasks: Sequence[Factors], cutoff: float, absolute: bool, merge: Merge) -> Product:
    """KnOTS: X = U merge(Z_1 .. Z_T) with [tau_1 .. tau_T] = U diag(s) V^T and Z_t = diag(s) V_t.

    From a core: Q_B R_B diag(R_1^T .. R_T^T) with [B_1 .. B_T] = Q_B R_B and A_t^T = Q_t R_t. Only s above `cutoff`,
    times the largest unless `absolute`, are taken.
    """
    basis, R = orthonormal(np.concatenate([task.B for task in tasks], axis=1))
    rows, sides = zip(*(orthonormal(task.A.T) for task in tasks), strict=True)
    parts = split([len(task.A) for task in tasks], R, axis=1)
    core = np.concatenate([part @ side.T for part, side in zip(parts, sides, strict=True)], axis=1)
    u, s, vh = np.linalg.svd(core, full_matrices=False)
    count = int((s > (cutoff if absolute else cutoff * s[:1].sum())).sum())
    if count == 0:
        return nothing(tasks[0].shape)
    U, signs = _signed(basis @ u[:, :count])
    right = (s[:count] * signs)[:, None] * vh[:count]
    blocks = split([len(side) for side in sides], right, axis=1)
    return Product(U, merge([block @ Q.T for block, Q in zip(blocks, rows, strict=True)]))


def two_sided(tasks: Sequence[Factors], merge: Merge) -> Product:
    """Core Space: X = U merge(M_1 .. M_T) V^T, M_t = U^T B_t A_t V, so that tau_t = U M_t V^T.

    U are the left singular vectors of [B_1 .. B_T], V the right ones of the A_t under each other, R x d_in.
    """
    U = _left_vectors(np.concatenate([task.B for task in tasks], axis=1))
    V = _left_vectors(np.concatenate([task.A for task in tasks]).T)
    cores = [(U.T @ task.B) @ (task.A @ V) for task in tasks]
    return Product(U, merge(cores) @ V.T)


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
    signs = np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1.0, 1.0)
    return U * signs, signs
