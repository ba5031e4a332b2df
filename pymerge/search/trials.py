"""Trials: merges by some coefficients, and what a user's function says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pymerge.common.progress import CountBar
from pymerge.errors import ArgumentError
from pymerge.live.merger import Merger

Array = NDArray[np.float64]
Evaluate = Callable[[Mapping[str, Tensor]], "Sequence[float] | Mapping[str, float]"]


class Trials:
    """Merges and measures; keeps all coefficients and metrics."""

    def __init__(self, merger: Merger, evaluate: Evaluate, bar: CountBar) -> None:
        self._merger, self._evaluate = merger, evaluate
        self._fixed = {"normalize": False} if "normalize" in merger.varying else {}
        self._bar = bar
        self._samples: list[Array] = []
        self._measured: list[Array] = []

    @property
    def samples(self) -> Array:
        """S x T coefficients so far."""
        return np.array(self._samples)

    @property
    def measured(self) -> Array:
        """S x N metrics so far."""
        return np.array(self._measured)

    def measure(self, coefficients: Array) -> Array:
        """K x N metrics of the merges with K x T coefficients, in one pass over the models."""
        merges = self._merger.merge_many([{"weight": row.tolist(), **self._fixed} for row in coefficients])
        for row, merged in zip(coefficients, merges, strict=True):
            metrics = self._numbers(self._evaluate(merged), row)
            self._samples.append(row)
            self._measured.append(metrics)
            self._bar.advance()
        return np.array(self._measured[len(self._measured) - len(coefficients) :])

    def _numbers(self, given: Sequence[float] | Mapping[str, float], row: Array) -> Array:
        """The metrics of a merge as an array of N."""
        values: Any = list(given.values()) if isinstance(given, Mapping) else given
        said = f"evaluate at the coefficients {[round(float(each), 4) for each in row]}"
        try:
            found = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{said} gave {given!r}; it has to give a number for each task") from error
        if found.ndim != 1 or not len(found):
            raise ArgumentError(f"{said} gave {given!r}; it has to give a sequence of numbers, one for each task")
        if not np.isfinite(found).all():
            raise ArgumentError(f"{said} gave {found.tolist()}; a surrogate can only be fitted to finite numbers")
        if self._measured and len(found) != len(self._measured[0]):
            raise ArgumentError(f"{said} gave {len(found)} numbers, and {len(self._measured[0])} before")
        return found
