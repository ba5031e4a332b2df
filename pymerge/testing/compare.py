"""Comparison of a result with a float64 truth, by the error that plain PyTorch makes in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# A result may err by this factor more than the reference does in the same precision.
FACTOR = 2.0


@dataclass(frozen=True)
class Comparison:
    """Whether it holds, the share of the tolerance that was used, and the first element out of it."""

    ok: bool
    share: float
    message: str


def compare(actual: Tensor, baseline: Tensor, truth: Tensor) -> Comparison:
    """Compare `actual` with `truth` (float64).

    Args:
        actual: the result under test, any floating dtype.
        baseline: the reference's result in the same dtype; its largest error, times 2, is the tolerance.
        truth: the reference's result in float64.

    To the tolerance comes a floor of one rounding of the largest true value in the result's dtype. NaN and
    infinities must be where the baseline has them; the largest error is taken over the rest.
    """
    if actual.shape != baseline.shape or actual.dtype != baseline.dtype:
        return Comparison(
            False,
            float("inf"),
            f"{tuple(actual.shape)} {actual.dtype}, expected {tuple(baseline.shape)} {baseline.dtype}",
        )
    actual, baseline, truth = actual.cpu(), baseline.cpu(), truth.cpu()
    special = ~torch.isfinite(baseline)
    kinds = torch.where(torch.isnan(actual), 2.0, torch.sign(actual.double()) * torch.isinf(actual))
    expected = torch.where(torch.isnan(baseline), 2.0, torch.sign(baseline.double()) * torch.isinf(baseline))
    if not torch.equal(kinds, expected):
        return Comparison(
            False, float("inf"), "NaN or infinity: " + _first_difference(actual, baseline, kinds != expected)
        )
    if actual.numel() == 0 or bool(special.all()):
        return Comparison(True, 0.0, "nothing finite to compare")
    error = torch.where(special, 0.0, actual.double() - truth).abs()
    finite_truth = torch.where(special, 0.0, truth)
    floor = torch.finfo(actual.dtype).eps * float(finite_truth.abs().max())
    baseline_error = float(torch.where(special, 0.0, baseline.double() - truth).abs().max())
    tolerance = FACTOR * baseline_error + floor
    worst = float(error.max())
    share = worst / tolerance if tolerance > 0 else (0.0 if worst == 0 else float("inf"))
    message = (
        f"largest error {worst:.3g}, reference's {baseline_error:.3g}, {share:.0%} of {tolerance:.3g}; "
        + _first_difference(actual, truth, error > tolerance)
    )
    return Comparison(share <= 1.0, share, message)


def assert_accurate(label: str, actual: Tensor, baseline: Tensor, truth: Tensor) -> None:
    """AssertionError naming the first element that is out of tolerance, unless `compare` holds."""
    outcome = compare(actual, baseline, truth)
    if not outcome.ok:
        raise AssertionError(f"{label}: {outcome.message}")


def assert_same(label: str, actual: Tensor, expected: Tensor) -> None:
    """AssertionError naming the first difference, unless equal bit for bit (NaN equals NaN)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{label}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
        )
    actual, expected = actual.cpu(), expected.cpu()
    # Zeros of different sign differ, too.
    differs = (actual != expected) | (torch.signbit(actual) != torch.signbit(expected))
    differs &= ~(torch.isnan(actual) & torch.isnan(expected))
    if bool(differs.any()):
        raise AssertionError(f"{label}: {_first_difference(actual, expected, differs)}")


def as_float64(tensor: Tensor) -> Array:
    """The tensor's exact values in float64."""
    return tensor.to(torch.float64).numpy()


def relative_error(found: Array, expected: Array, scale: Array | None = None) -> float:
    """Frobenius norm of the difference over that of `scale` (default: of what was expected)."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected if scale is None else scale))


def _first_difference(actual: Tensor, expected: Tensor, differs: Tensor) -> str:
    places = torch.nonzero(differs)
    if len(places) == 0:
        return "no element differs"
    place = tuple(int(index) for index in places[0])
    return (
        f"{len(places)} of {differs.numel()} elements differ, first at {list(place)}: "
        f"{float(actual[place])!r}, expected {float(expected[place])!r}"
    )
