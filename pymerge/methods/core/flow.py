"""Closed forms of WUDI in the row space of the factors: gradient flow, and the filters of SWUDI and SWUDI-A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from pymerge.methods.core.deltas import Product, Spanned, nothing
from pymerge.methods.core.factors import Factors, RowSpace, row_space, total_of
from pymerge.methods.core.tall import Matrix
from pymerge.ops.spectral_filter import FLOOR, RANK_SLACK, Rank, kept

# lambda t below which (1 - e^{-lambda t}) / lambda is t to rounding.
_STANDING = 1e-16


def flow(tasks: Sequence[Factors], time: float) -> Product | Spanned:
    """Gradient flow for a time, as `gradient_flow` has it, without its series."""
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    parts = shares(space)
    values, vectors = np.linalg.eigh(total_of(parts))
    x = np.maximum(values * time, _STANDING)
    return _moved(space, parts, vectors, time * (-np.expm1(-x) / x))


def filtered(tasks: Sequence[Factors], time: float, rank: Rank) -> Product | Spanned:
    """A filter on the leading eigenvectors of A, as `spectral_filter` has it: those of all d_in are counted.

    B_0 has no part in the other d_in - q, whose eigenvalue is 0, so that they only count where a rank is chosen.
    """
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    parts = shares(space)
    values, vectors = np.linalg.eigh(total_of(parts))
    d_in = space.shape[1]
    count = min(len(values), kept(np.concatenate([np.zeros(d_in - len(values)), values]), rank))
    if math.isinf(time):
        noise = RANK_SLACK * np.finfo(values.dtype).eps * d_in * float(values[-1])
        count = min(count, int((values > noise).sum()))
    leading = np.maximum(values[len(values) - count :], FLOOR)
    gain = 1.0 / leading if math.isinf(time) else -np.expm1(-leading * time) / leading
    return _moved(space, parts, vectors[:, len(values) - count :], gain)


def shares(space: RowSpace) -> list[Matrix]:
    """G_t / n_t of A = Q (sum_t G_t / n_t) Q^T, q x q."""
    return [*space.squared([square / norm for square, norm in zip(space.squares, space.norms, strict=True)])]


def moves(space: RowSpace, parts: Sequence[Matrix]) -> list[Matrix]:
    """The rows of B_0 = sum_t (tau_t - X_0) G_t / n_t in the core, to each B_s: -L_s sum_{t != s} G_t / n_t.

    Task t moves all but itself, which is summed without it and not by a difference.
    """
    before = chain([np.zeros_like(parts[0])], accumulate(parts[:-1]))
    after = [*reversed([*accumulate(reversed(parts[1:]))]), np.zeros_like(parts[0])]
    return [-L @ (first + last) for L, first, last in zip(space.L, before, after, strict=True)]


def _moved(space: RowSpace, parts: Sequence[Matrix], basis: Matrix, gain: Matrix) -> Spanned:
    """X_0 + B_0 V diag(gain) V^T with V = Q basis."""
    rows = [L + (move @ basis * gain) @ basis.T for L, move in zip(space.L, moves(space, parts), strict=True)]
    return space.product(space.B, np.concatenate(rows))
