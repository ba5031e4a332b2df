"""Closed forms of WUDI in the row space of the factors: gradient flow, and the filters of SWUDI and SWUDI-A."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.methods.core.factors import Factors, Product, RowSpace, nothing, row_space
from pymerge.ops.spectral_filter import FLOOR, RANK_SLACK, Rank, kept

# lambda t below which (1 - e^{-lambda t}) / lambda is t to rounding.
_STANDING = 1e-16


def flow(tasks: Sequence[Factors], time: float) -> Product:
    """Gradient flow for a time, as `gradient_flow` has it, without its series."""
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    parts = shares(space)
    values, vectors = torch.linalg.eigh(torch.stack(parts).sum(dim=0))
    x = (values * time).clamp(min=_STANDING)
    return _moved(space, parts, vectors, time * (-torch.expm1(-x) / x))


def filtered(tasks: Sequence[Factors], time: float, rank: Rank) -> Product:
    """A filter on the leading eigenvectors of A, as `spectral_filter` has it: those of all d_in are counted.

    B_0 has no part in the other d_in - q, whose eigenvalue is 0, so that they only count where a rank is chosen.
    """
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    parts = shares(space)
    values, vectors = torch.linalg.eigh(torch.stack(parts).sum(dim=0))
    d_in = space.shape[1]
    count = min(len(values), kept(torch.cat([values.new_zeros(d_in - len(values)), values]), rank))
    if math.isinf(time):
        noise = RANK_SLACK * torch.finfo(values.dtype).eps * d_in * float(values[-1])
        count = min(count, int((values > noise).sum()))
    leading = values[len(values) - count :].clamp(min=FLOOR)
    gain = 1.0 / leading if math.isinf(time) else -torch.expm1(-leading * time) / leading
    return _moved(space, parts, vectors[:, len(values) - count :], gain)


def shares(space: RowSpace) -> list[Tensor]:
    """G_t / n_t of A = Q (sum_t G_t / n_t) Q^T, q x q."""
    return [gram / norm for gram, norm in zip(space.grams(space.B), space.norms, strict=True)]


def moves(space: RowSpace, parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of B_0 = sum_t (tau_t - X_0) G_t / n_t in the core, to each B_s: -L_s sum_{t != s} G_t / n_t.

    Task t moves all but itself, which is summed without it and not by a difference.
    """
    found = []
    for s, L in enumerate(space.L):
        others = [part for t, part in enumerate(parts) if t != s]
        found.append(-L @ torch.stack(others).sum(dim=0) if others else torch.zeros_like(L))
    return found


def _moved(space: RowSpace, parts: Sequence[Tensor], basis: Tensor, gain: Tensor) -> Product:
    """X_0 + B_0 V diag(gain) V^T with V = Q basis."""
    rows = [L + (move @ basis * gain) @ basis.mT for L, move in zip(space.L, moves(space, parts), strict=True)]
    return space.product(space.joined, torch.cat(rows))
