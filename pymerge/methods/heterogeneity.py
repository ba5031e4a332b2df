"""Heterogeneity of tasks, by which ACE-Merging chooses between two formulas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

# Keeps logarithms and divisions of the released code finite. It belongs to the released numbers.
TINY = 1e-12
# Where the mean of log n_t is closer to 0 than this, the released gamma is large because of the scale of the deltas.
_POLE = 1.0
AT_THE_POLE = (
    "their squared norms are near 1, where ace's gamma has a pole: that tasks count as heterogeneous, and X is "
    "refined, follows from the deltas' scale; set gamma: scale_free, or gamma_threshold: .inf (never), -1 (always)"
)

Variant = Literal["released", "paper"]
Gamma = Literal["released", "scale_free"]


def heterogeneity(norms: Sequence[float], variant: Variant, gamma: Gamma = "released") -> float:
    """gamma = Var_t[log n_t] / Mean_t[log n_t]^2 of the squared norms n_t; NaN for one task.

    "released": unbiased variance, and 1e-12 inside the logarithm and in the denominator. "paper": population
    variance. It is not invariant to the scale of the deltas: it has a pole where the mean of log n_t is 0. As
    "scale_free" it is the variance alone, which a common factor of the deltas does not change.
    """
    if len(norms) < 2:
        return math.nan
    released = variant == "released"
    logs = [math.log(norm + (TINY if released and gamma == "released" else 0.0)) for norm in norms]
    variance = statistics.variance(logs) if released else statistics.pvariance(logs)
    if gamma == "scale_free":
        return variance
    square = statistics.fmean(logs) ** 2 + (TINY if released else 0.0)
    return variance / square if square != 0.0 else math.inf


def near_the_pole(norms: Sequence[float]) -> bool:
    """Whether squared norms are so close to 1 in their geometric mean that gamma follows from their scale."""
    return len(norms) > 1 and abs(statistics.fmean(map(math.log, norms))) < _POLE
