"""Quadratic surrogates: a task's metric as a quadratic function of the models' coefficients."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import ArgumentError

Array = NDArray[np.float64]
ACTIVATIONS = ("identity", "sigmoid", "softplus")
_CLIP = 500.0  # of the sigmoid's argument: exp(500) is finite in float64
_CALLS = 20_000  # of the residuals, at most


def least_points(tasks: int) -> int:
    """Number of coefficients of a quadratic in T variables: (T + 1)(T + 2) / 2."""
    return (tasks + 1) * (tasks + 2) // 2


def variables_of(coefficients: int) -> int:
    """The T of a quadratic with (T + 1)(T + 2) / 2 coefficients."""
    return (math.isqrt(8 * coefficients + 1) - 3) // 2


def features(coefficients: Array) -> Array:
    """K x (T + 1)(T + 2) / 2: squares, products of two in the order of their pairs, the coefficients, and 1."""
    first, second = np.triu_indices(coefficients.shape[1], 1)
    products = coefficients[:, first] * coefficients[:, second]
    return np.concatenate([coefficients**2, products, coefficients, np.ones((len(coefficients), 1))], axis=1)


def predict(surrogate: Array, coefficients: Array, activation: str) -> Array:
    """K x N metrics of surrogates, N x (T + 1)(T + 2) / 2, at K x T coefficients."""
    return _activate(features(coefficients) @ surrogate.T, activation)


def fit(coefficients: Array, metrics: Array, activation: str) -> Array:
    """Fit a surrogate to each metric by least squares.

    Args:
        coefficients: K x T.
        metrics: K x N.

    Returns N x (T + 1)(T + 2) / 2, float64, in the order of `features`.

    Raises ArgumentError if the points do not determine the quadratic, or a metric is out of the activation's range.
    """
    design = features(coefficients)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ArgumentError(
            f"{len(design)} points do not determine a quadratic in {coefficients.shape[1]} coefficients; "
            f"give more points than {len(design)}"
        )
    linear: Array = np.linalg.lstsq(design, metrics, rcond=None)[0].T
    if activation == "identity":
        return linear
    return np.stack([_fit_one(design, metric, number, activation) for number, metric in enumerate(metrics.T)])


def _fit_one(design: Array, metric: Array, number: int, activation: str) -> Array:
    """The surrogate of one metric, by Levenberg and Marquardt's method, begun at the quadratic of the inverse."""
    from scipy.optimize import OptimizeWarning, curve_fit

    outside = metric[(metric <= 0) | (metric >= 1 if activation == "sigmoid" else False)]
    if len(outside) and (outside.min() < 0 or (activation == "sigmoid" and outside.max() > 1)):
        reached = "0 to 1" if activation == "sigmoid" else "0 and above"
        raise ArgumentError(
            f"a metric of task {number + 1} is {outside[np.abs(outside).argmax()]:g}, and {activation} takes values "
            f"of {reached}; scale the metric, or choose activation='identity'"
        )
    start = np.linalg.lstsq(design, _invert(metric, activation), rcond=None)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # as many points as coefficients have no covariance
        found = curve_fit(
            lambda _, *given: _activate(design @ np.asarray(given), activation), None, metric, p0=start, maxfev=_CALLS
        )[0]
    return np.asarray(found, dtype=np.float64)


def _activate(value: Array, activation: str) -> Array:
    if activation == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-np.clip(value, -_CLIP, _CLIP))))
    if activation == "softplus":
        return np.logaddexp(0, value)
    return value


def _invert(metric: Array, activation: str) -> Array:
    """Values that the activation would have made the metric of; ends of its range are moved inside."""
    small = 1e-6
    if activation == "sigmoid":
        inside = np.clip(metric, small, 1 - small)
        return np.log(inside / (1 - inside))
    inside = np.maximum(metric, small)
    return np.asarray(inside + np.log(-np.expm1(-inside)))
