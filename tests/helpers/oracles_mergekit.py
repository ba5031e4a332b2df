"""mergekit's other methods in numpy float64, straight from the formulas; arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def slerp(base: Array, model: Array, t: float) -> Array:
    a, b = base.ravel(), model.ravel()
    unit = [v / n if (n := np.linalg.norm(v)) > 1e-8 else v for v in (a, b)]
    cos = float(np.clip(unit[0] @ unit[1], -1, 1))
    if abs(cos) > 0.9995:
        return (1 - t) * base + t * model
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * model) / np.sin(angle)


def nuslerp(models: Sequence[Array], weights: Sequence[float], base: Array | None, axis: int | None) -> Array:
    """axis: None for one vector, else the axis along which the vectors lie."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    first, second = (model - (0 if base is None else base) for model in models)
    u, v = ((x / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-7)) for x in (first, second))
    cos = np.clip((u * v).sum(axis, keepdims=True), -1, 1)
    angle = np.arccos(cos)
    sin = np.sin(angle)
    safe = np.where(sin < 2.0**-12, 1.0, sin)
    arc = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / safe
    return (0 if base is None else base) + np.where(sin < 2.0**-12, (1 - t) * first + t * second, arc)


def multislerp(
    models: Sequence[Array], weights: Sequence[float], base: Array | None, normalize: bool = True, eps: float = 1e-8
) -> Array:
    """With the tangent step that the product leaves out."""
    shares = np.array(weights) / (sum(weights) if normalize else 1)
    vectors = np.array([(model - (0 if base is None else base)).ravel() for model in models])
    lengths = np.linalg.norm(vectors, axis=1)
    units = vectors / (lengths + eps)[:, None]
    mean = shares @ units
    mean = mean / np.linalg.norm(mean)
    tangent = shares @ (units - np.outer(units @ mean, mean))
    length = np.linalg.norm(tangent) + eps
    merged = (np.cos(length) * mean + np.sin(length) / length * tangent) * (shares @ lengths)
    return merged.reshape(models[0].shape) + (0 if base is None else base)


def karcher(models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    lengths = np.array([np.linalg.norm(model) for model in models])
    units = [model.ravel() / n for model, n in zip(models, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(models[0])
    u = np.mean(units, axis=0)
    u = units[0] if np.linalg.norm(u) < tol else u / np.linalg.norm(u)
    for _ in range(max_iter):
        step = np.zeros_like(u)
        for unit in units:
            cos = np.clip(u @ unit, -1, 1)
            angle = np.arccos(cos)
            if angle >= tol:
                step += angle / np.sin(angle) * (unit - cos * u) / len(units)
        length = np.linalg.norm(step)
        if length < tol:
            break
        u = np.cos(length) * u + np.sin(length) * step / length
        u = u / np.linalg.norm(u)
    return (u * lengths.mean()).reshape(models[0].shape)


def model_stock(base: Array, models: Sequence[Array], filter_wise: bool = False, least: float = 0.0) -> Array:
    rows = base.reshape(-1, base.shape[-1]) if filter_wise else base.reshape(1, -1)
    taus = [model.reshape(rows.shape) - rows for model in models]
    cosines = []
    for i, left in enumerate(taus):
        for right in taus[i + 1 :]:
            product = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            product = np.maximum(product, least)
            cosines.append(np.clip((left * right).sum(1) / np.where(product == 0, 1, product), -1, 1))
    c, count = np.mean(cosines, axis=0)[:, None], len(models)
    t = count * c / (1 + (count - 1) * c)
    mean = np.mean([model.reshape(rows.shape) for model in models], axis=0)
    return (t * mean + (1 - t) * rows).reshape(base.shape)


def nearswap(base: Array, model: Array, t: float) -> Array:
    q = np.clip(t / np.maximum(np.abs(model - base), 1e-6), 0, 1)
    return q * model + (1 - q) * base


def ram(base: Array, models: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    taus = np.array([model - base for model in models])
    active = np.abs(taus) > epsilon
    count = active.sum(0)
    total = np.zeros_like(base)
    for tau, touched in zip(taus, active, strict=True):
        lone, shared = (touched & (count == 1)).sum(), (touched & (count > 1)).sum()
        factor = 1 + r * min(shared / max(lone, 1), alpha)
        total += np.where(touched, tau / np.maximum(count, 1) * np.where(count == 1, factor, 1), 0)
    return base + total


def sce(base: Array, models: Sequence[Array], select_topk: float, compat: bool = False) -> Array:
    taus = np.array([model - base for model in models])
    if select_topk < 1:
        spread = taus.var(0).ravel()
        k = int(np.count_nonzero(spread) * select_topk)
        mask = np.zeros(spread.size)
        mask[np.argsort(-spread, kind="stable")[:k]] = 1
        taus = taus * mask.reshape(base.shape)
    keep = np.sign(taus) == np.where(taus.sum(0) >= 0, 1, -1)
    energies = np.array([np.mean(tau**2) for tau in taus])
    uniform = energies.sum() < 1e-6 if compat else energies.sum() == 0
    weights = np.full(len(taus), 1 / len(taus)) if uniform else energies / energies.sum()
    weighted = keep * weights.reshape(-1, *[1] * base.ndim)
    divisor = np.maximum(weighted.sum(0), 1e-6) if compat else weighted.sum(0)
    return base + (taus * weighted).sum(0) / np.where(divisor == 0, 1, divisor)


def arcee_fusion(base: Array, model: Array) -> Array:
    def probabilities(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = probabilities(model), probabilities(base)
    scores = np.abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(scores.ravel())
    low, middle, high = (ordered[(ordered.size - 1) * quarter // 4] for quarter in (1, 2, 3))
    return np.where(scores >= middle + 1.5 * (high - low), model, base)
