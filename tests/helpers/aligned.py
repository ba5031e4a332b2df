"""KnOTS and Core Space with all elements, in float64, straight from the papers and their code."""

from __future__ import annotations

from typing import Any

import numpy as np


def signed(U: Any) -> Any:
    """Columns whose largest element is positive."""
    return U * np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1.0, 1.0)


def knots(taus: list[Any]) -> tuple[Any, list[Any]]:
    """U and the Z_t of all task vectors side by side, tau_t = U Z_t."""
    M = np.hstack(taus)
    U, s, _ = np.linalg.svd(M, full_matrices=False)
    U = signed(U[:, s > 1e-10 * s[0]])
    return U, np.split(U.T @ M, len(taus), axis=1)


def core_space(factors: Any) -> tuple[Any, Any, list[Any]]:
    """U, V and the U^T tau_t V of the bases of all factors."""
    B, A = (np.hstack([f.B for f in factors]), np.vstack([f.A for f in factors]))
    U, V = signed(np.linalg.svd(B, full_matrices=False)[0]), signed(np.linalg.svd(A.T, full_matrices=False)[0])
    return U, V, [U.T @ f.B @ f.A @ V for f in factors]


def disjoint_mean(parts: list[Any], density: float, *, equal: bool = False) -> Any:
    """TIES of arrays of one shape: the largest kept, one sign for each entry, the mean of those that have it.

    With `equal`, all that are at least the one after them.
    """
    kept = []
    for part in parts:
        count = int(density * part.size)
        order = np.argsort(-np.abs(part).reshape(-1), kind="stable")
        mask = np.zeros(part.size)
        mask[order[:count]] = 1.0
        if equal:
            mask[np.abs(part).reshape(-1) >= np.abs(part).reshape(-1)[order[min(count, part.size - 1)]]] = 1.0
        kept.append(part * mask.reshape(part.shape))
    vote = np.sign(sum(kept))
    vote = np.where(vote == 0, np.sign(vote.sum()), vote)
    agreeing = [np.where(np.sign(part) == vote, part, 0.0) for part in kept]
    return sum(agreeing) / np.maximum(1, sum(part != 0 for part in agreeing))


def disjoint_mean_together(layers: list[list[Any]], density: float, *, equal: bool = False) -> list[Any]:
    """TIES of the parts of all layers as one vector of each task, and the layers of what comes out."""
    tasks = [np.concatenate([parts[t].reshape(-1) for parts in layers]) for t in range(len(layers[0]))]
    merged = disjoint_mean(tasks, density, equal=equal)
    ends = np.cumsum([parts[0].size for parts in layers])[:-1]
    return [piece.reshape(parts[0].shape) for piece, parts in zip(np.split(merged, ends), layers, strict=True)]
