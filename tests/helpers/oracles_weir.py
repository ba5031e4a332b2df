"""weir and what it is made of in float64 numpy, one direction after the other: oracles of tests."""

from __future__ import annotations

import numpy as np

from tests.helpers.oracles import Matrix, filter_delta


def length_delta(base: Matrix, experts: list[Matrix], steps: int = 400) -> Matrix:
    """Return X of gradient flow on relative errors from the mean, stopped at the root mean square of the tasks' norms:
    its time by bisection, the flow by the exponential of the whole system."""
    taus = [expert - base for expert in experts if np.any(expert - base)]
    norms = [np.linalg.norm(tau) ** 2 for tau in taus]
    weights = [max(norm, np.mean(norms) / 16) ** -2.0 for norm in norms]
    A = sum(weight * tau.T @ tau for tau, weight in zip(taus, weights, strict=True))
    B = sum(weight * tau @ tau.T @ tau for tau, weight in zip(taus, weights, strict=True))
    length, mean = np.sqrt(np.mean(norms)), sum(taus) / len(taus)
    values, V = np.linalg.eigh(A)
    target = B @ np.linalg.pinv(A, rcond=1e-12, hermitian=True)  # the flow never leaves the rows of the task vectors

    def at(time: float) -> Matrix:
        return target + (mean - target) @ (V * np.exp(-np.maximum(values, 0.0) * time)) @ V.T

    low, high = 0.0, 1e10 / values.max()
    if np.linalg.norm(at(high)) <= length:
        return at(high)
    for _ in range(steps):
        middle = (low + high) / 2 if low == 0.0 or high / low < 4 else np.sqrt(low * high)
        low, high = (middle, high) if np.linalg.norm(at(middle)) < length else (low, middle)
    return at(low)


def weir_delta(base: Matrix, experts: list[Matrix]) -> Matrix:
    """Return X of weir on a linear weight: wudi_flow's, tempered below 7 / T or 1.75 root mean squares."""
    taus = [expert - base for expert in experts if np.any(expert - base)]
    return tempered(filter_delta(np.zeros_like(base), taus, 300.0, least=1 / 16)[0], taus, max(1.75, 7 / len(taus)))


def tempered(X: Matrix, taus: list[Matrix], most: float) -> Matrix:
    """Return X with its singular values scaled and below a crest, one direction after the other."""
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    rank = int((s > max(X.shape) * 2.0**-23 * s[0]).sum())
    asked = [[U[:, r] @ tau for tau in taus] for r in range(rank)]
    energies = [sum(a @ a for a in each) for each in asked]
    values = np.zeros_like(s)
    for r in range(rank):
        part = sum(s[r] * Vh[r] @ a for a in asked[r]) / energies[r]
        values[r] = s[r] / max(part, 1 / len(taus))
    crest = most * np.linalg.norm(values) / np.sqrt(rank)
    for r in np.flatnonzero(values > crest):
        pairs = sum(a @ b for i, a in enumerate(asked[r]) for j, b in enumerate(asked[r]) if i != j)
        agreed = pairs / (len(taus) - 1) / energies[r] if len(taus) > 1 else 1.0
        values[r] = crest + (values[r] - crest) * max(agreed, 0.0)
    return U * values @ Vh
