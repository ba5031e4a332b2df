"""ACE on low-rank task vectors: its system in the space of all rows and of a row of ones, which its prior adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.methods.core.factors import Factors, Product, RowSpace, row_space
from pymerge.ops.spectral_refine import isotropic_term


@dataclass(frozen=True, eq=False)
class Centred:
    """Tasks that are not zero, less their column means: C_t = B~_t L_t Q^T, B~_t = B_t - 1 b_t."""

    space: RowSpace  # with 1 = Q u
    B: tuple[Tensor, ...]  # B~_t, d_out x r_t
    means: tuple[Tensor, ...]  # b_t, 1 x r_t
    grams: tuple[Tensor, ...]  # C_t^T C_t in their cores, q x q
    traces: tuple[float, ...]  # p_t, squared Frobenius norms of C_t

    def only(self, kept: Sequence[int]) -> Centred:
        """Some of the tasks."""
        B, means, grams = (tuple(part[t] for t in kept) for part in (self.B, self.means, self.grams))
        return Centred(self.space.only(kept), B, means, grams, tuple(self.traces[t] for t in kept))


def centred(tasks: Sequence[Factors]) -> Centred:
    """The tasks with their covariances."""
    ones = tasks[0].A.new_ones(1, tasks[0].shape[1])
    space = row_space(tasks, ones)
    means = tuple(B.mean(dim=0, keepdim=True) for B in space.B)
    B = tuple(left - mean for left, mean in zip(space.B, means, strict=True))
    grams = tuple(space.grams(B))
    return Centred(space, B, means, grams, tuple(float(gram.trace()) for gram in grams))


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
    eye = torch.eye(q, dtype=torch.float64)
    covariances = [weight * gram for weight, gram in zip(formula.weights, tasks.grams, strict=True)]
    total = torch.stack(covariances).sum(dim=0)
    prior = (space.U @ total) / (space.shape[1] * formula.divisor)
    system = total + rho * eye + space.U.mT @ prior
    solved = [
        torch.linalg.solve(system.mT, (L @ (covariance + ridge * eye)).mT).mT
        for L, covariance, ridge in zip(space.L, covariances, formula.ridges, strict=True)
    ]
    left = space.B if formula.paper else tasks.B
    if not formula.refined:
        return space.product(torch.cat(left, dim=1), torch.cat(solved))

    # All of it from [B_1 .. B_T | 1]: the means of the numerator, where it has them subtracted, are rows to 1.
    share = (total if formula.paper else total + rho * eye) / len(space)
    residual = torch.cat([L @ (covariance - share) for L, covariance in zip(space.L, covariances, strict=True)])
    of_ones = torch.zeros(1, q, dtype=torch.float64)
    if not formula.paper:
        of_ones -= torch.cat(tasks.means, dim=1) @ torch.cat(solved)
    basis, R = torch.linalg.qr(torch.cat([*space.B, torch.ones(space.shape[0], 1, dtype=torch.float64)], dim=1))
    X = R @ torch.cat([*solved, of_ones])
    D = R @ torch.cat([residual, torch.zeros_like(of_ones)])
    return space.product(basis, X + isotropic_term(D + X, formula.refined, max(space.shape)))
