"""Numbers that describe the task vectors of one tensor, and of a whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pymerge.common.names import block, template
from pymerge.methods.heterogeneity import heterogeneity

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TensorMeasures:
    """Sums over all elements of one tensor, for its T task vectors tau_t = W_t - W_0."""

    name: str
    kind: str
    shape: tuple[int, ...]
    elements: int
    base_square: float  # ||W_0||_F^2
    dots: Matrix  # [T][T]: <tau_s, tau_t>; the diagonal holds the squared norms n_t
    absolute: float  # sum_t ||tau_t||_1
    net: float  # ||sum_t tau_t||_1
    unchanged: tuple[int, ...]  # for each task: elements where tau_t is 0

    @property
    def norms(self) -> tuple[float, ...]:
        """n_t = ||tau_t||_F^2 of each task."""
        return tuple(self.dots[task][task] for task in range(len(self.dots)))

    @property
    def cancellation(self) -> float:
        """1 - ||sum_t tau_t||_1 / sum_t ||tau_t||_1: 0 where all tasks pull the same way, 1 - 1/sqrt(T) for independent
        Gaussian ones, 1 where they cancel. NaN if no task touched the tensor."""
        return 1.0 - self.net / self.absolute if self.absolute > 0 else math.nan

    @property
    def gamma(self) -> float:
        """ACE's heterogeneity of the tasks that touched the tensor, as released (arXiv 2603.02945); NaN for one."""
        return heterogeneity([norm for norm in self.norms if norm > 0], "released")

    @property
    def mean_cosine(self) -> float:
        """Mean cosine of two different task vectors; NaN if fewer than two tasks touched the tensor."""
        values = [value for _, _, value in pairs(cosines(self.dots)) if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    @property
    def relative_size(self) -> float:
        """Largest ||tau_t||_F / ||W_0||_F; infinite where the base is 0."""
        largest = max(self.norms)
        return math.sqrt(largest / self.base_square) if self.base_square > 0 else math.inf if largest > 0 else 0.0

    @property
    def template(self) -> str:
        """The name with * for numbers."""
        return template(self.name)

    @property
    def block(self) -> int | None:
        """The block number; None outside the blocks."""
        return block(self.name)


def sums_of(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Sums over some elements of W_0 and T tensors W_t of one shape, any floating dtype, as one float64 vector:
    ||W_0||^2, sum_t ||tau_t||_1, ||sum_t tau_t||_1, T numbers of elements where tau_t is 0, T x T inner products.

    Differences are formed in float32 at least; these sums too, and float64 adds up those of all pieces: pictures need
    no more than some digits.
    """
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    origin = base.to(dtype).flatten()
    taus = origin.new_empty(len(experts), origin.numel())
    for tau, expert in zip(taus, experts, strict=True):
        torch.sub(expert.to(dtype).flatten(), origin, out=tau)
    square = origin.dot(origin)
    dots = taus @ taus.mT
    net = taus.sum(dim=0).abs_().sum()
    unchanged = (taus == 0).sum(dim=1)
    absolute = taus.abs_().sum()
    return torch.cat([torch.stack([square, absolute, net]).double(), unchanged.double(), dots.double().flatten()])


def sums_bytes(tasks: int) -> int:
    """Bytes of what `sums_of` gives."""
    return 8 * (3 + tasks + tasks**2)


def is_measured(sums: Tensor) -> bool:
    """Whether the elements were finite, and their differences small enough for the sums."""
    return bool(torch.isfinite(sums[:2]).all())


def tensor_measures(name: str, kind: str, shape: tuple[int, ...], sums: Tensor) -> TensorMeasures:
    """The measures of a tensor from the sums over all of its elements."""
    tasks = math.isqrt(len(sums) - 3)  # T^2 + T numbers behind the first three: below (T + 1)^2
    (square, absolute, net), unchanged, dots = sums[:3].tolist(), sums[3 : 3 + tasks], sums[3 + tasks :]
    return TensorMeasures(
        name,
        kind,
        shape,
        math.prod(shape),
        square,
        tuple(map(tuple, dots.view(tasks, tasks).tolist())),
        absolute,
        net,
        tuple(map(int, unchanged.tolist())),
    )


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the task vectors of one linear weight, d_out x d_in."""

    name: str
    shape: tuple[int, int]
    values: Matrix  # [T][min(shape)]: descending

    @property
    def ranks(self) -> tuple[int, ...]:
        """For each task, how many singular directions hold 90 % of n_t; 0 for a task that did not touch the weight."""
        return tuple(_rank(values, 0.9) for values in self.values)


def _rank(values: Sequence[float], share: float) -> int:
    wanted, total = share * sum(value**2 for value in values), 0.0
    for count, value in enumerate(values):
        if total >= wanted:
            return count
        total += value**2
    return len(values)


@dataclass(frozen=True)
class Analysis:
    """Measures of all tensors that a merge would change, and singular values of some of them."""

    experts: tuple[str, ...]
    tensors: tuple[TensorMeasures, ...]
    spectra: tuple[Spectrum, ...] = ()
    left_out: tuple[str, ...] = field(default=())  # weights whose singular values would not fit into memory

    @cached_property
    def dots(self) -> Matrix:
        """[T][T]: inner products of whole task vectors, over all tensors."""
        tasks = range(len(self.experts))
        return tuple(
            tuple(math.fsum(tensor.dots[row][column] for tensor in self.tensors) for column in tasks) for row in tasks
        )

    @property
    def base_norm(self) -> float:
        """||W_0||_F over all tensors."""
        return math.sqrt(math.fsum(tensor.base_square for tensor in self.tensors))

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    def unchanged(self, task: int) -> float:
        """Share of all elements that a task left as they were."""
        return sum(tensor.unchanged[task] for tensor in self.tensors) / max(1, self.elements)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; NaN and infinity as None."""
        tensors = [
            asdict(tensor)
            | {
                name: getattr(tensor, name) if math.isfinite(getattr(tensor, name)) else None
                for name in ("cancellation", "gamma", "mean_cosine", "relative_size")
            }
            for tensor in self.tensors
        ]
        spectra = [asdict(spectrum) | {"ranks": spectrum.ranks} for spectrum in self.spectra]
        cosine = [[None if math.isnan(value) else value for value in row] for row in cosines(self.dots)]
        return {
            "experts": self.experts,
            "cosines": cosine,
            "tensors": tensors,
            "spectra": spectra,
            "left_out": self.left_out,
        }


def cosines(dots: Matrix) -> Matrix:
    """Cosines from inner products; NaN beside a vector of length 0."""
    lengths = [math.sqrt(dots[task][task]) for task in range(len(dots))]
    return tuple(
        tuple(
            max(-1.0, min(1.0, dot / (lengths[row] * lengths[column]))) if lengths[row] * lengths[column] else math.nan
            for column, dot in enumerate(values)
        )
        for row, values in enumerate(dots)
    )


def pairs(matrix: Matrix) -> list[tuple[int, int, float]]:
    """(row, column, value) below the diagonal."""
    return [(row, column, matrix[row][column]) for row in range(len(matrix)) for column in range(row)]
