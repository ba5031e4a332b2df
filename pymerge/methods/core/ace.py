"""ACE on low-rank task vectors: its system in the space of all rows and of a row of ones, which its prior adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pymerge.methods.core.deltas import Spanned
from pymerge.methods.core.factors import Factors, RowSpace, Tasks, row_space, total_of
from pymerge.methods.core.tall import Matrix, Tall, basis_of
from pymerge.ops.spectral_refine import isotropic_term


@dataclass(frozen=True, eq=False)
class Centred:
    """Tasks that are not zero, less their column means: C_t = B~_t L_t Q^T, B~_t = B_t - 1 b_t.

    C_t^T C_t in their cores, q x q, are made from `squares` whenever they are asked for: those of all tasks at once
    would be the most memory that a solution takes.
    """

    space: RowSpace  # with 1 = U Q^T
    means: tuple[Matrix, ...]  # b_t, 1 x r_t
    squares: tuple[Matrix, ...]  # B~_t^T B~_t
    traces: tuple[float, ...]  # p_t, squared Frobenius norms of C_t

    def only(self, kept: Sequence[int]) -> Centred:
        """Some of the tasks."""
        means, squares = (tuple(part[t] for t in kept) for part in (self.means, self.squares))
        return Centred(self.space.only(kept), means, squares, tuple(self.traces[t] for t in kept))


def centred(tasks: Sequence[Factors]) -> Centred:
    """The tasks with their covariances."""
    found = Tasks.of(tasks)
    row = Tall(found.left).means()
    means = [row[:, place] for place in found.places]
    squares = [Tall(found.left[:, place]).gram(less=mean) for place, mean in zip(found.places, means, strict=True)]
    rows = len(found.left)
    whole = [square + rows * (mean.T @ mean) for square, mean in zip(squares, means, strict=True)]
    space = row_space(found, whole, ones=True)
    kept = tuple(squares[t] for t in space.kept)
    traces = tuple(float(np.trace(gram)) for gram in space.squared(kept))
    return Centred(space, tuple(means[t] for t in space.kept), kept, traces)


@dataclass(frozen=True)
class Formula:
    """Formula of the released code or of the paper for these tasks."""

    weights: Sequence[float]  # w_t of the covariances
    ridges: Sequence[float]  # e_t
    divisor: float  # of the prior
    paper: bool  # the numerator has the task vectors, and the average of the residual no ridge
    refined: int  # k of the refinement; 0 without


def merged(tasks: Centred, formula: Formula) -> Spanned:
    """X of ACE's closed form, refined where asked for.

    Outside of Q the system is rho I and the numerator 0: what is solved in the core is all of it.
    """
    space, rho = tasks.space, sum(formula.ridges)
    q = space.basis.size
    eye = np.eye(q)

    def covariances() -> Iterator[Matrix]:
        return (weight * gram for weight, gram in zip(formula.weights, space.squared(tasks.squares), strict=True))

    total = total_of(covariances())
    prior = (space.U @ total) / (space.shape[1] * formula.divisor)
    system = total + rho * eye + space.U.T @ prior
    numerator = np.concatenate(
        [
            L @ (covariance + ridge * eye)
            for L, covariance, ridge in zip(space.L, covariances(), formula.ridges, strict=True)
        ]
    )
    solved = np.linalg.solve(system.T, numerator.T).T  # rows of all tasks: one factor of the system
    if formula.paper and not formula.refined:
        return space.product(space.B, solved)

    # All of it from [B_1 .. B_T | 1]: the means of the numerator, where it has them subtracted, are rows to 1.
    of_ones = np.zeros((1, q))
    if not formula.paper:
        of_ones -= np.concatenate(tasks.means, axis=1) @ solved
    left = Tall(space.B.M, ones=True)
    if not formula.refined:
        return space.product(left, np.concatenate([solved, of_ones]))
    share = (total if formula.paper else total + rho * eye) / len(space)
    residual = np.concatenate([L @ (covariance - share) for L, covariance in zip(space.L, covariances(), strict=True)])
    basis = basis_of(left)
    X = basis.R @ np.concatenate([solved, of_ones])
    D = basis.R @ np.concatenate([residual, np.zeros_like(of_ones)])
    return space.product(basis.tall, basis.X @ (X + isotropic_term(D + X, formula.refined, max(space.shape))))
