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


def filter_delta(
    base: Matrix, experts: list[Matrix], time: float, rank: float | str = 1.0, least: float = 0.0
) -> tuple[Matrix, Matrix]:
    """Return (X, X_0) of SWUDI's filters: exponential for a time (infinite: none) on the leading eigenvectors.

    Each task's error counts by 1 / ||tau_t||^2, of at least the share `least` of their mean.
    """
    taus = [expert - base for expert in experts if np.any(expert - base)]
    start = sum(taus)
    squares = [np.linalg.norm(tau) ** 2 for tau in taus]
    squares = [max(square, least * np.mean(squares)) for square in squares]
    C = sum(tau.T @ tau / square for tau, square in zip(taus, squares, strict=True))
    D = sum(tau @ tau.T @ tau / square for tau, square in zip(taus, squares, strict=True))
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


def tact_delta(base: Matrix, experts: list[Matrix], kappa: float) -> Matrix:
    """Return X of TACT, by numpy's pseudo-inverse with the cutoff of float32."""
    left, covariance = np.zeros_like(base), np.zeros((base.shape[1], base.shape[1]))
    for expert in experts:
        tau = expert - base
        kept = tau * kept_magnitudes(tau, 0, max(1, round(kappa * tau.size)))
        left += tau @ kept.T @ kept
        covariance += kept.T @ kept
    return left @ np.linalg.pinv(covariance, rcond=base.shape[1] * 2.0**-23, hermitian=True)


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


def dc_delta(
    base: Matrix,
    experts: list[Matrix],
    core_share: float = 1e-3,
    rank: int | None = None,
    smoothing: str = "none",
) -> Matrix:
    """Return X of DC-Merge for task vectors of full rank: bases of r columns, or of `rank` a task, the rest of the
    core outside the blocks that the tasks have set to 0."""
    taus, size = [expert - base for expert in experts], min(base.shape)
    k = size // len(taus) if rank is None else rank
    side = size if rank is None else k * len(taus)
    U, V, cut = np.zeros((base.shape[0], size)), np.zeros((base.shape[1], size)), []
    for t, tau in enumerate(taus):
        P, s, Qh = np.linalg.svd(tau, full_matrices=False)
        U[:, t * k : t * k + k], V[:, t * k : t * k + k] = P[:, :k], Qh[:k].T
        weights = s[:k]
        if smoothing == "avg":
            weights = np.full(k, s[:k].mean())
        if smoothing == "linear":
            weights = np.linspace(min(5.0, s[0] / s[k - 1]), 1.0, k)
            weights = weights / weights.sum() * s[:k].sum()
        cut.append(P[:, :k] * weights @ Qh[:k])
    U, V = polar_factor(U)[:, :side], polar_factor(V)[:, :side]
    cores = []
    for tau in cut:
        core = U.T @ tau @ V
        largest = np.sort(np.abs(core).reshape(-1))[::-1][max(1, int(core_share * side**2)) - 1]
        cores.append(np.where(np.abs(core) >= largest, core, 0.0))
    stack = np.stack(cores)
    agrees = np.sign(stack) == np.sign(stack.sum(0))
    agrees &= stack.sum(0) != 0
    merged = (stack * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    blocks = np.kron(np.eye(side // k), np.ones((k, k)))
    inside = np.zeros((side, side))
    inside[: len(blocks), : len(blocks)] = blocks
    return U @ (merged * inside) @ V.T


def calibrated(X: Matrix, base: Matrix, experts: list[Matrix], alpha: float = 1.0) -> Matrix:
    """Return X by SVC, one direction and one task after the other."""
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    factors = []
    for direction in U.T:
        merged, parts = direction @ X, []
        for expert in experts:
            own = direction @ (expert - base)
            parts.append(max(merged @ own / max(own @ own, 1e-12), alpha))
        factors.append(len(experts) / sum(parts))
    return U * (s * np.array(factors)) @ Vh


def boosted(X: Matrix, beta: float) -> Matrix:
    """Return X by Subspace-Boosting, but for directions that are rounding."""
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    if not X.any():
        return X
    rank = int((s > max(X.shape) * 2.0**-23 * s[0]).sum())
    U, s, Vh = U[:, :rank], s[:rank], Vh[:rank]
    cut = next((i for i in range(len(s)) if s[: i + 1].sum() / s.sum() >= beta), len(s) - 1)
    return U * np.where(np.arange(len(s)) > cut, s[cut], s) @ Vh


def leading(M: Matrix, rank: int, restored: bool = False) -> Matrix:
    """Return what the leading singular directions hold of a matrix, its nuclear norm restored if asked."""
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    kept = s[:rank] * (s.sum() / s[:rank].sum() if restored else 1.0)
    return U[:, :rank] * kept @ Vh[:rank]


def shrunk(M: Matrix, mu: float, rule: str) -> Matrix:
    """Return a matrix with shrunk singular values; for the squared norm the threshold is searched by halving."""
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    low, high = 0.0, mu * float(s.sum())
    for _ in range(200):  # of t = mu * sum max(s - t, 0)
        middle = (low + high) / 2
        low, high = (middle, high) if mu * np.maximum(s - middle, 0).sum() > middle else (low, middle)
    threshold = {"svt": mu, "exact_nuc": mu / 2, "exact_sq": high}[rule]
    return U * np.maximum(s - threshold, 0) @ Vh


def resmerge_delta(
    base: Matrix, experts: list[Matrix], largest: float = 1.0, least: float = 0.7, head: float = 0.2
) -> Matrix:
    """Return X of ResMerge for two tasks or more, all of whose residuals and leading directions are not 0."""
    taus = [expert - base for expert in experts]
    heads = [leading(tau, 1) for tau in taus]
    residuals = [tau - own for tau, own in zip(taus, heads, strict=True)]
    units = [R / (np.linalg.norm(R) + 1e-8) for R in residuals]
    pairs = [(i, j) for i in range(len(taus)) for j in range(i)]

    def cosine(one: Matrix, two: Matrix) -> float:
        sizes = np.linalg.norm(one) * np.linalg.norm(two)
        return float((one * two).sum() / sizes) if sizes > 0 else 0.0

    total = sum(units)
    agreement = min(max(float(np.mean([cosine(q, total) for q in units])), 0.0), 1.0)
    A = sum(residuals) / len(taus)
    if np.linalg.norm(total) > 1e-8 and agreement > 1 / np.sqrt(len(taus)):
        alike = np.mean([cosine(units[i], units[j]) for i, j in pairs])
        beta = largest - (largest - least) * ((alike + 1) / 2 + (agreement + 1) / 2) / 2
        A = total / np.linalg.norm(total) * agreement**beta * np.mean([np.linalg.norm(R) for R in residuals])
    common = float(np.mean([max(0.0, cosine(heads[i], heads[j])) for i, j in pairs]))
    mean = sum(heads) / len(taus)
    if min(common, float(np.linalg.norm(mean)), float(np.linalg.norm(A))) < 1e-8:
        return A
    return A + mean / np.linalg.norm(mean) * head * common * np.linalg.norm(A)


def doge_thresholds(taus: list[list[Matrix]], density: float) -> list[float]:
    """The least magnitude that is kept of each task, of all elements of its weights: n - int(density n) from below."""
    found = []
    for own in taus:
        flat = np.sort(np.abs(np.concatenate([tau.reshape(-1) for tau in own])))
        found.append(float(flat[max(flat.size - int(flat.size * density), 1) - 1]))
    return found


def doge_delta(
    taus: list[Matrix],
    thresholds: list[float],
    scale: float = 0.07,
    steps: int = 400,
    lr: float = 1e-4,
    subspace: int = 6,
) -> Matrix:
    """Return X of DOGE: the gradient from the loss's inner products, row by row, an explicit projector."""
    size = min(taus[0].shape)
    lengths = [scale / np.linalg.norm(tau) for tau in taus]
    parts = [np.linalg.svd(tau, full_matrices=False)[0][:, : int(size / len(taus))] for tau in taus]
    count = int(size / subspace)
    Q = np.linalg.svd(np.hstack(parts), full_matrices=False)[0][:, :count] if len(taus) > 1 else parts[0][:, :count]
    keep = np.eye(len(taus[0])) - Q @ Q.T
    D, m, v = (np.zeros_like(taus[0]) for _ in range(3))
    for step in range(1, steps + 1):
        total = sum(length * (tau + D) for length, tau in zip(lengths, taus, strict=True))
        gradient = np.zeros_like(D)
        for tau in taus:
            for row in range(len(tau)):
                gradient[row] -= 2 * sum(lengths) * (tau[row] @ (tau[row] - total[row])) * tau[row]
        gradient = keep @ gradient
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        D = D - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    zipped = zip(lengths, taus, thresholds, strict=True)
    return sum(length * np.where(np.abs(tau) >= threshold, tau + D, 0.0) for length, tau, threshold in zipped)


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
