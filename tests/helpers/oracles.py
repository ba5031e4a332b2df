"""Independent float64 forms of the methods, straight from the published formulas, in numpy. Nothing here is shared
with the engine: no normal equations, no Sherman-Morrison, no displacement coordinates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def wudi_delta(base: Matrix, experts: list[Matrix], iterations: int = 300, lr: float = 1e-5) -> tuple[Matrix, Matrix]:
    """Return (X, X_0) of WUDI's released loop: Adam on sum_t ||(X - tau_t) tau_t^T||^2 / n_t from the sum."""
    taus = [expert - base for expert in experts]
    taus = [tau for tau in taus if np.any(tau)]
    X = np.zeros_like(base) + sum(taus)
    start = X.copy()
    m, v = np.zeros_like(X), np.zeros_like(X)
    for step in range(1, iterations + 1):
        grad = np.zeros_like(X)
        for tau in taus:
            interference = (X - tau) @ tau.T
            grad += 2.0 * interference @ tau / np.linalg.norm(tau) ** 2
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad * grad
        X = X - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return X, start


def ace_delta(
    base: Matrix,
    experts: list[Matrix],
    eps: float = 1e-5,
    gamma_threshold: float = 0.3,
    k_frac: float = 0.3,
    variant: str = "released",
) -> Matrix:
    """Return X of ACE, released code or paper, with an explicit inverse and a full SVD.

    The refinement is restricted to the numerical rank; its mean is over k singular values, as published.
    """
    released = variant == "released"
    taus = [expert - base for expert in experts]
    taus = [tau for tau in taus if np.any(tau)]
    if not taus:
        return np.zeros_like(base)
    count, d_in = len(taus), base.shape[1]
    norms = np.array([np.trace(tau.T @ tau) for tau in taus])
    tiny = 1e-12 if released else 0.0
    logs = np.log(norms + tiny)
    with np.errstate(all="ignore"):
        gamma = (np.var(logs, ddof=1) if count > 1 else np.nan) if released else np.var(logs)
        gamma = gamma / (np.mean(logs) ** 2 + tiny)
    heterogeneous = gamma_threshold < 0 or bool(gamma > gamma_threshold)
    numerator, system, plain = np.zeros_like(base), np.zeros((d_in, d_in)), np.zeros((d_in, d_in))
    scaled = []
    for tau in taus:
        centred = tau - tau.mean(axis=0, keepdims=True)
        cov = centred.T @ centred
        trace = np.trace(cov) + tiny
        ridge = eps
        if heterogeneous:
            cov, ridge = cov / trace, eps / trace
        numerator += (centred if released else tau) @ (cov + ridge * np.eye(d_in))
        system += cov + ridge * np.eye(d_in)
        plain += cov
        scaled.append(cov)
    row = plain.mean(axis=0)
    if heterogeneous and released:
        row = row / (norms.mean() + tiny)
    X = numerator @ np.linalg.inv(system + np.ones((d_in, 1)) * row[None, :])
    if heterogeneous:
        mean_cov = (system if released else plain) / count
        residual = sum(tau @ (cov - mean_cov) for tau, cov in zip(taus, scaled, strict=True))
        U, s, Vh = np.linalg.svd(residual + X, full_matrices=False)
        k = max(1, int(min(base.shape) * k_frac))
        rank = min(k, int((s > max(base.shape) * 2.0**-23 * s[0]).sum()))
        X = X + s[:k].mean() * U[:, :rank] @ Vh[:rank]
    return X


def filter_delta(base: Matrix, experts: list[Matrix], time: float, rank: float | str = 1.0) -> tuple[Matrix, Matrix]:
    """Return (X, X_0) of SWUDI's filters: exponential for a time (infinite: none) on the leading eigenvectors."""
    taus = [expert - base for expert in experts if np.any(expert - base)]
    start = sum(taus)
    C = sum(tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    D = sum(tau @ tau.T @ tau / np.linalg.norm(tau) ** 2 for tau in taus)
    values, V = np.linalg.eigh(C)
    clamped = np.maximum(values, 1e-8)
    h = np.ones_like(values) if np.isinf(time) else -np.expm1(-clamped * time)
    if rank == "participation_sqrt":
        roots = np.sqrt(clamped)
        count = int(np.ceil(roots.sum() ** 2 / (roots**2).sum()))
    else:
        count = max(1, int(np.floor(len(values) * rank + 0.999)))
    if np.isinf(time):  # never divide by what is 0 but for rounding
        count = min(count, int((values > 1e-12 * values.max()).sum()))
    h[: len(values) - count] = 0.0
    return start - start @ V * h @ V.T + D @ V * (h / clamped) @ V.T, start


def polar_factor(M: Matrix) -> Matrix:
    """P Q^T of M = P S Q^T."""
    P, _, Qh = np.linalg.svd(M, full_matrices=False)
    return P @ Qh


def tsv_delta(base: Matrix, experts: list[Matrix]) -> Matrix:
    """Return X of TSV-M for task vectors of full rank, zero columns after the T k vectors as published."""
    taus = [expert - base for expert in experts]
    size = min(base.shape)
    k = int(size * (1 / len(taus)))
    U, s, V = np.zeros((base.shape[0], size)), np.zeros(size), np.zeros((base.shape[1], size))
    for t, tau in enumerate(taus):
        P, values, Qh = np.linalg.svd(tau, full_matrices=False)
        columns = slice(t * k, (t + 1) * k)
        U[:, columns], s[columns], V[:, columns] = P[:, :k], values[:k], Qh[:k].T
    return polar_factor(U) * s @ polar_factor(V).T


def iso_delta(base: Matrix, experts: list[Matrix], common: float = 1.0) -> Matrix:
    """Return X of Iso-C (common 1) and Iso-CTS for sums and residuals of full rank."""
    taus = [expert - base for expert in experts]
    size, tasks = min(base.shape), len(taus)
    P, values, Qh = np.linalg.svd(sum(taus), full_matrices=False)
    specific = round((size - int(size * common)) / tasks) * tasks
    shared = size - specific
    us, ss, vs = [], [], []
    for tau in taus:
        own = np.linalg.svd(tau - P[:, :shared] @ P[:, :shared].T @ tau, full_matrices=False)
        count = specific // tasks
        us, ss, vs = [*us, own[0][:, :count]], [*ss, own[1][:count]], [*vs, own[2][:count].T]
    us, ss, vs = [*us, P[:, :shared]], [*ss, values[:shared]], [*vs, Qh[:shared].T]
    U, s, V = np.hstack(us), np.concatenate(ss), np.hstack(vs)
    return float(s.mean()) * polar_factor(U) @ polar_factor(V).T


def kept_magnitudes(tau: Matrix, begin: int, end: int) -> NDArray[np.bool_]:
    """Elements whose rank by descending magnitude, equal ones in the order of their index, is begin .. end - 1."""
    flat = np.abs(tau).reshape(-1)
    order = np.lexsort((np.arange(flat.size), -flat))
    keep = np.zeros(flat.size, dtype=bool)
    keep[order[begin:end]] = True
    return keep.reshape(tau.shape)


def della_probabilities(tau: Matrix, density: float, epsilon: float) -> Matrix:
    """Keep probabilities by ascending rank in the row, equal magnitudes in the order of their index."""
    rows = np.atleast_2d(tau).reshape(-1, tau.shape[-1])
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    return (density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)).reshape(tau.shape)


def sparse_delta(
    taus: list[Matrix],
    masks: list[NDArray[np.bool_]],
    weights: list[float],
    *,
    elect: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    scale: float = 1.0,
) -> Matrix:
    """The merged delta of mergekit's generalised task arithmetic, given what is kept of each task vector."""
    kept = [np.where(mask, tau, 0.0) for tau, mask in zip(taus, masks, strict=True)]
    if rescale:
        norms = [(np.abs(tau).sum(), np.abs(part).sum()) for tau, part in zip(taus, kept, strict=True)]
        kept = [part if min(pair) < 1e-7 else part * pair[0] / pair[1] for part, pair in zip(kept, norms, strict=True)]
    values = np.stack([weight * part for weight, part in zip(weights, kept, strict=True)])
    column = np.array(weights).reshape(-1, *[1] * taus[0].ndim)
    agrees = np.ones(values.shape, dtype=bool)
    if elect:
        agrees = np.sign(values) == np.where(values.sum(0) >= 0, 1, -1)
    total, share = (values * agrees).sum(0), (column * agrees).sum(0)
    if normalize:
        total = total / np.where(share == 0, 1.0, share)
    return scale * total


def in_one(model: dict[str, Matrix]) -> Matrix:
    """All tensors of a model as one vector, in the order of their names."""
    return np.concatenate([model[name].reshape(-1) for name in sorted(model)])


def apart(vector: Matrix, like: dict[str, Matrix]) -> dict[str, Matrix]:
    """The inverse of `in_one`."""
    found, start = {}, 0
    for name in sorted(like):
        found[name] = vector[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return found


def fusion_bench_ties(
    base: dict[str, Matrix], experts: list[dict[str, Matrix]], density: float, scale: float
) -> dict[str, Matrix]:
    """TIES as FusionBench has it: one vector for each model, whose elements from the k-th smallest magnitude on are
    kept, k = n - int(density n) counted from 1; signs by the sum, where it is 0 by the majority; merged by `sum`."""
    origin = in_one(base)
    taus = np.stack([in_one(expert) - origin for expert in experts])
    numel = origin.size
    smallest = numel - int(numel * density)
    thresholds = np.sort(np.abs(taus), axis=1)[:, max(smallest - 1, 0)]
    kept = np.where(np.abs(taus) >= thresholds[:, None], taus, 0.0)
    signs = np.sign(kept.sum(0))
    signs = np.where(signs == 0, np.sign(signs.sum()), signs)
    agrees = np.where(signs > 0, kept > 0, kept < 0)
    return apart(origin + scale * (kept * agrees).sum(0), base)
