"""Parts that are plain memory: the ops in C++ (pymerge._C), one thread each, without PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.backends.combine_files import DTYPES
from pymerge.common.shapes import Axis, exact, row_bytes, vector_shape
from pymerge.methods.linear import element_count
from pymerge.methods.parts import Between, Kept, Limits, Models, Part, from_the_nearer

_C: Any = importlib.import_module("pymerge._C")


class Raw(NamedTuple):
    """A contiguous tensor in memory, as one row: what csrc/bindings takes for a matrix."""

    address: int
    dtype: int  # by pymerge.backends.combine_files.DTYPES
    numel: int


class RawPart(Part):
    """Rows of a base and experts; results go to `out`, of as many elements.

    `used` is told the name of each op that is called.
    """

    def __init__(
        self,
        base: Raw | None,
        experts: Sequence[Raw],
        out: Raw,
        shape: tuple[int, ...],
        used: Callable[[str], None],
        first: int = 0,
        row: int = 0,
    ) -> None:
        super().__init__(first, row, shape)
        self._base = base
        self._experts = list(experts)
        self._out = out
        self._used = used
        self._numel = element_count(shape)

    def trim_threshold(self, counts: Sequence[int]) -> Limits:
        self._used("trim_threshold")
        known = [exact(self._numel, count) for count in counts]
        wanted = [task for task, found in enumerate(known) if found is None]
        keys, ends = np.empty(len(wanted), np.int64), np.empty(len(wanted), np.int64)
        _C.trim_threshold(
            keys.ctypes.data,
            ends.ctypes.data,
            self._base,
            [self._experts[task] for task in wanted],
            [counts[task] for task in wanted],
            1,
        )
        for task, key, end in zip(wanted, keys.tolist(), ends.tolist(), strict=True):
            known[task] = key, end
        found = [each for each in known if each is not None]
        return Limits([key for key, _ in found], [end for _, end in found])

    def magnitude_counts(self, tasks: Sequence[int], prefixes: Sequence[int], shift: int, bits: int) -> NDArray[Any]:
        self._used("magnitude_counts")
        counts = np.zeros((len(tasks), 1 << bits), np.int64)
        experts = [self._experts[task] for task in tasks]
        _C.magnitude_counts(counts.ctypes.data, self._base, experts, list(prefixes), shift, bits, 1)
        return counts

    def behind(self, task: int, key: int, count: int) -> int:
        place: int = _C.magnitude_place(self._base, self._experts[task], key, count)
        return place

    def magnitude_mask(self, between: Between) -> Kept:
        self._used("magnitude_mask")
        masks, kept, dropped = self._masks(), _numbers(between.kept), _numbers(between.dropped)
        limits = (_places(kept), _places(dropped))
        _C.magnitude_mask(_addresses(masks, norms=True), self._base, self._experts, *limits, 1)
        return masks

    def random_mask(
        self, lowest: Sequence[float], highest: Sequence[float], keys: Sequence[int], *, norms: bool
    ) -> Kept:
        self._used("random_mask")
        masks, columns = self._masks(), self.shape[-1] if self.shape else 1
        rows = self._numel // max(1, columns)
        draws = (list(lowest), list(highest), list(keys))
        _C.random_mask(_addresses(masks, norms), self._base, self._experts, *draws, self.first, rows, columns, 1)
        return masks

    def join(self, bits: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return bits[0] if len(bits) == 1 else np.concatenate(bits, axis=1)

    def sparse_combine(
        self,
        weights: Sequence[float],
        *,
        mask: NDArray[Any] | Between | None,
        factors: Sequence[float],
        elect: bool,
        normalize: bool,
        scale: float,
    ) -> None:
        self._used("sparse_combine")
        kept = dropped = bits = None
        if isinstance(mask, Between):
            kept, dropped = _numbers(mask.kept), _numbers(mask.dropped)
        else:
            bits = mask
        _C.sparse_combine(
            self._out,
            self._base,
            self._experts,
            0 if bits is None else bits.ctypes.data,
            _places(kept),
            _places(dropped),
            [weight * factor for weight, factor in zip(weights, factors, strict=True)],
            list(weights),
            elect,
            normalize,
            scale,
            1,
        )

    def task_dots(self, models: Models, axis: Axis) -> NDArray[Any]:
        self._used("task_dots")
        if axis != "whole":
            raise NotImplementedError("inner products of rows and columns are pymerge.backends.native's")
        origin, tensors = self._vectors(models)
        dots = np.empty((1, len(tensors), len(tensors)))
        _C.task_dots(dots.ctypes.data, origin, tensors, 1, self._numel, 1)
        return dots

    def combine(self, models: Models, weights: Sequence[float]) -> None:
        self._used("combine")
        origin, tensors = self._vectors(models)
        near = from_the_nearer(models, weights)
        if near is not None:
            origin, tensors, weights = tensors[near], [tensors[1 - near]], [weights[1 - near]]
        _C.combine(self._out, origin, tensors, list(weights), 1.0, 1)

    def combine_vectors(self, models: Models, weights: NDArray[Any], axis: Axis) -> None:
        raise NotImplementedError("sums with weights of each vector are pymerge.backends.native's")

    def nonzero(self) -> int:
        (zeros,) = self.magnitude_counts([0], [0], 0, 0)[0]
        return self._numel - int(zeros)

    def spread(self) -> RawPart:
        self._used("sce_spread")
        spread = np.empty(self._numel, np.float32)
        _C.sce_spread(_scores(spread), self._base, self._experts, 1)
        return _Scores(spread, 1, self)

    def energies(self, bits: NDArray[Any] | None) -> NDArray[Any]:
        self._used("sce_energies")
        energies = np.empty(len(self._experts))
        _C.sce_energies(energies.ctypes.data, self._base, self._experts, 0 if bits is None else bits.ctypes.data, 1)
        return energies

    def majority_mean(self, weights: Sequence[float], bits: NDArray[Any] | None, least: float) -> None:
        self._used("sce")
        selected = 0 if bits is None else bits.ctypes.data
        _C.sce(self._out, self._base, self._experts, selected, list(weights), least, 1)

    def active_counts(self, epsilon: float) -> NDArray[Any]:
        self._used("ram_counts")
        counts = np.empty((len(self._experts), 2), np.int64)
        _C.ram_counts(counts.ctypes.data, self._base, self._experts, epsilon, 1)
        return counts

    def mean_of_active(self, epsilon: float, factors: Sequence[float]) -> None:
        self._used("ram")
        _C.ram(self._out, self._base, self._experts, epsilon, list(factors) or None, 1)

    def divergence(self) -> NDArray[Any]:
        self._used("row_divergence")
        divergence = np.empty(self._rows[0])
        _C.row_divergence(divergence.ctypes.data, self._base, *self._experts, *self._rows, 1)
        return divergence

    def importance(self, divergence: NDArray[Any], times: int) -> RawPart:
        self._used("importance")
        scores = np.empty(self._numel, np.float32)
        _C.importance(_scores(scores), self._base, *self._experts, divergence.ctypes.data, *self._rows, 1)
        return _Scores(scores, times, self)

    def take_important(self, divergence: NDArray[Any], least: float) -> None:
        self._used("arcee_fusion")
        _C.arcee_fusion(self._out, self._base, *self._experts, divergence.ctypes.data, least, *self._rows, 1)

    @property
    def _rows(self) -> tuple[int, int]:
        """Rows along the last axis, and their length."""
        return vector_shape(self.shape, "rows")

    def _vectors(self, models: Models) -> tuple[Raw | None, list[Raw]]:
        """The origin (None: zero) and the tensors whose differences from it are the vectors."""
        assert self._base is not None
        tensors = [self._base, *self._experts] if models.with_base else self._experts
        return self._base if models.on_base else None, tensors

    def _masks(self) -> Kept:
        tasks = len(self._experts)
        return Kept(np.zeros((tasks, row_bytes(self._numel)), np.uint8), np.empty(tasks), np.empty(tasks))


class _Scores(RawPart):
    """Numbers of at least 0, one for each element of a part, as equal task vectors on no base."""

    def __init__(self, scores: NDArray[Any], times: int, part: RawPart) -> None:
        expert = _scores(scores)
        nothing = expert._replace(address=0)
        super().__init__(None, [expert] * times, nothing, part.shape, part._used, part.first, part.row)
        self._array = scores  # lives as long as the part


def _addresses(masks: Kept, norms: bool) -> tuple[int, int, int]:
    return masks.bits.ctypes.data, masks.before.ctypes.data if norms else 0, masks.after.ctypes.data


def _numbers(limits: Limits | None) -> NDArray[Any] | None:
    """Keys and ends, [2, T]."""
    return None if limits is None else np.array([limits.keys, limits.ends], np.int64)


def _places(numbers: NDArray[Any] | None) -> tuple[int, int] | None:
    """Addresses of the keys and the ends."""
    return None if numbers is None else (numbers[0].ctypes.data, numbers[1].ctypes.data)


def _scores(scores: NDArray[Any]) -> Raw:
    return Raw(scores.ctypes.data, DTYPES["F32"], scores.size)
