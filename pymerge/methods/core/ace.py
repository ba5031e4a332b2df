"""ACE on low-rank task vectors: its system in the space of all rows and of a row of ones, which its prior adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pymerge.methods.core.factors import Factors, Matrix, Product, RowSpace, orthonormal, row_space, total_of
from pymerge.ops.spectral_refine import isotropic_term


@dataclass(frozen=True, eq=False)
class Centred:
    """Tasks that are not zero, less their column means: C_t = B~_t L_t Q^T, B~_t = B_t - 1 b_t."""

    space: RowSpace  # with 1 = Q u
    B: tuple[Matrix, ...]  # B~_t, d_out x r_t
    means: tuple[Matrix, ...]  # b_t, 1 x r_t
    grams: tuple[Matrix, ...]  # C_t^T C_t in their cores, q x q
    traces: tuple[float, ...]  # p_t, squared Frobenius norms of C_t

    def only(self, kept: Sequence[int]) -> Centred:
        """Some of the tasks."""
        B, means, grams = (tuple(part[t] for t in kept) for part in (self.B, self.means, self.grams))
        return Centred(self.space.only(kept), B, means, grams, tuple(self.traces[t] for t in kept))


def centred(tasks: Sequence[Factors]) -> Centred:
    """The tasks with their covariances."""
    space = row_space(tasks, np.ones((1, tasks[0].shape[1])))
    means = tuple(B.mean(axis=0, keepdims=True) for B in space.B)
    B = tuple(left - mean for left, mean in zip(space.B, means, strict=True))
    grams = tuple(space.grams(B))
    return Centred(space, B, means, grams, tuple(float(np.trace(gram)) for gram in grams))


@dataclass(frozen=True)
class Formula:
    """Formula of the released code or of the paper for these tasks."""

    weights: Sequence[float]  # w_t of the covariances
    ridges: Sequence[float]  # e_t
    divisor: float  # of the prior
    paper: bool  # the numerator has the task vectors, and the average of the residual no ridge
    refined: int  # k of the refinement; 0 without


def merged(tasks: Centred, formula: Formula) -> Product:
    """X of ACE's closed form, refined where asked for.

    Outside of Q the system is rho I and the numerator 0: what is solved in the core is all of it.
    """
    space, rho = tasks.space, sum(formula.ridges)
    q = space.Q.shape[1]
    eye = np.eye(q)
    covariances = [weight * gram for weight, gram in zip(formula.weights, tasks.grams, strict=True)]
    total = total_of(covariances)
    prior = (space.U @ total) / (space.shape[1] * formula.divisor)
    system = total + rho * eye + space.U.T @ prior
    solved = [
        np.linalg.solve(system.T, (L @ (covariance + ridge * eye)).T).T
        for L, covariance, ridge in zip(space.L, covariances, formula.ridges, strict=True)
    ]
    left = space.B if formula.paper else tasks.B
    if not formula.refined:
        return space.product(np.concatenate(left, axis=1), np.concatenate(solved))

    # All of it from [B_1 .. B_T | 1]: the means of the numerator, where it has them subtracted, are rows to 1.
    share = (total if formula.paper else total + rho * eye) / len(space)
    residual = np.concatenate([L @ (covariance - share) for L, covariance in zip(space.L, covariances, strict=True)])
    of_ones = np.zeros((1, q))
    if not formula.paper:
        of_ones -= np.concatenate(tasks.means, axis=1) @ np.concatenate(solved)
    basis, R = orthonormal(np.concatenate([*space.B, np.ones((space.shape[0], 1))], axis=1))
    X = R @ np.concatenate([*solved, of_ones])
    D = R @ np.concatenate([residual, np.zeros_like(of_ones)])
    return space.product(basis, X + isotropic_term(D + X, formula.refined, max(space.shape)))
