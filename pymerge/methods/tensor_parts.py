"""Parts that are PyTorch tensors, on any device and backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pymerge.common.shapes import Axis
from pymerge.methods.base import OpRunner
from pymerge.methods.parts import SUM_ELEMENTS, Between, Kept, Limits, Models, Part, from_the_nearer
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops._op import compute_dtype
from pymerge.ops.trim_threshold import Thresholds, behind


class TensorPart(Part):
    """Rows of a base and experts, W_0 and W_t of one shape and device; results are in `out_dtype`."""

    def __init__(
        self,
        run_op: OpRunner,
        base: Tensor,
        experts: Sequence[Tensor],
        out_dtype: torch.dtype,
        first: int = 0,
        row: int = 0,
    ) -> None:
        super().__init__(first, row, tuple(base.shape))
        self._run_op = run_op
        self._base = base
        self._experts = experts
        self._dtype = out_dtype
        self.key_bits = 63 if compute_dtype(base, *experts) == torch.float64 else 31

    def rows(self, start: int, stop: int) -> TensorPart:
        """Some rows of this part."""
        experts = [expert[start:stop] for expert in self._experts]
        first = self.first + start * self._base[0].numel()
        return TensorPart(self._run_op, self._base[start:stop], experts, self._dtype, first, self.row + start)

    def trim_threshold(self, counts: Sequence[int]) -> Limits:
        found: Thresholds = self._run_op("trim_threshold", self._base, self._experts, counts)
        return Limits(found.keys.tolist(), found.ends.tolist())

    def magnitude_counts(self, tasks: Sequence[int], prefixes: Sequence[int], shift: int, bits: int) -> NDArray[Any]:
        experts = [self._experts[task] for task in tasks]
        return _array(self._run_op("magnitude_counts", self._base, experts, prefixes, shift, bits))

    def behind(self, task: int, key: int, count: int) -> int:
        return behind(self._base, self._experts[task], key, count)

    def magnitude_mask(self, between: Between) -> Kept:
        kept, dropped = between
        lower, upper = self._thresholds(kept), None if dropped is None else self._thresholds(dropped)
        return _kept(self._run_op("magnitude_mask", self._base, self._experts, lower, upper))

    def random_mask(
        self, lowest: Sequence[float], highest: Sequence[float], keys: Sequence[int], *, norms: bool
    ) -> Kept:
        return _kept(self._run_op("random_mask", self._base, self._experts, lowest, highest, keys, self.first))

    def join(self, bits: Sequence[Tensor]) -> Tensor:
        return bits[0] if len(bits) == 1 else torch.cat(tuple(bits), dim=1)

    def sparse_combine(
        self,
        weights: Sequence[float],
        *,
        mask: Tensor | Between,
        factors: Sequence[float],
        elect: bool,
        normalize: bool,
        scale: float,
    ) -> Tensor:
        bits = self.magnitude_mask(mask).bits if isinstance(mask, Between) else mask
        merged: Tensor = self._run_op(
            "sparse_combine",
            self._base,
            self._experts,
            weights,
            self._dtype,
            bits=bits,
            factors=factors,
            elect=elect,
            normalize=normalize,
            scale=scale,
        )
        return merged

    def task_dots(self, models: Models, axis: Axis) -> NDArray[Any]:
        return _array(self._run_op("task_dots", *self._vectors(models), axis))

    def combine(self, models: Models, weights: Sequence[float]) -> Tensor:
        origin, tensors = self._vectors(models)
        near = from_the_nearer(models, weights)
        if near is not None:
            origin, tensors, weights = tensors[near], [tensors[1 - near]], [weights[1 - near]]
        merged = torch.empty(self.shape, dtype=self._dtype, device=self._base.device)
        target, flat = merged.view(-1), [tensor.reshape(-1) for tensor in tensors]
        start = None if origin is None else origin.reshape(-1)
        for at in range(0, merged.numel(), SUM_ELEMENTS):
            here = slice(at, at + SUM_ELEMENTS)
            target[here] = self._run_op(
                "combine", None if start is None else start[here], [each[here] for each in flat], weights, self._dtype
            )
        return merged

    def combine_vectors(self, models: Models, weights: NDArray[Any], axis: Axis) -> Tensor:
        numbers = torch.from_numpy(weights).to(self._base.device)
        merged: Tensor = self._run_op("combine_vectors", *self._vectors(models), numbers, axis, self._dtype)
        return merged

    def nonzero(self) -> int:
        return int(torch.count_nonzero(self._experts[0] != self._base))

    def spread(self) -> TensorPart:
        return self._scores(self._run_op("sce_spread", self._base, self._experts), 1)

    def energies(self, bits: Tensor | None) -> NDArray[Any]:
        return _array(self._run_op("sce_energies", self._base, self._experts, bits))

    def majority_mean(self, weights: Sequence[float], bits: Tensor | None, least: float) -> Tensor:
        merged: Tensor = self._run_op("sce", self._base, self._experts, weights, bits, least, self._dtype)
        return merged

    def active_counts(self, epsilon: float) -> NDArray[Any]:
        return _array(self._run_op("ram_counts", self._base, self._experts, epsilon))

    def mean_of_active(self, epsilon: float, factors: Sequence[float]) -> Tensor:
        merged: Tensor = self._run_op("ram", self._base, self._experts, epsilon, factors, self._dtype)
        return merged

    def divergence(self) -> NDArray[Any]:
        return _array(self._run_op("row_divergence", self._base, self._experts[0]))

    def importance(self, divergence: NDArray[Any], times: int) -> TensorPart:
        numbers = torch.from_numpy(divergence).to(self._base.device)
        return self._scores(self._run_op("importance", self._base, self._experts[0], numbers), times)

    def take_important(self, divergence: NDArray[Any], least: float) -> Tensor:
        numbers = torch.from_numpy(divergence).to(self._base.device)
        merged: Tensor = self._run_op("arcee_fusion", self._base, self._experts[0], numbers, least, self._dtype)
        return merged

    def _scores(self, scores: Tensor, times: int) -> TensorPart:
        """Numbers of at least 0, as the difference of equal experts from a base of zeros."""
        experts = [scores] * times
        return TensorPart(self._run_op, torch.zeros_like(scores), experts, scores.dtype, self.first, self.row)

    def _vectors(self, models: Models) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The origin (None: zero) and the tensors whose differences from it are the vectors."""
        tensors = [self._base, *self._experts] if models.with_base else self._experts
        return self._base if models.on_base else None, tensors

    def _thresholds(self, limits: Limits) -> Thresholds:
        return Thresholds(*(torch.tensor(numbers, device=self._base.device) for numbers in limits))


def _kept(masks: TaskMasks) -> Kept:
    return Kept(masks.bits, _array(masks.before), _array(masks.after))


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
