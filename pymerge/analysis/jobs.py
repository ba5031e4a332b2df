"""Jobs of a report: the steps that measure tensors, for the executor of the merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pymerge.adapters.summed import is_sum, of_sum
from pymerge.analysis.measures import is_measured, sums_bytes, sums_of
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite
from pymerge.errors import NonFiniteError
from pymerge.methods.actions import Encode
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Step

# Elements of a piece: in float32, with the differences of all tasks, some MiB a task. Pieces follow from the shape
# alone, so that sums are rounded the same whatever the memory.
PIECE_ELEMENTS = 2**20
# Float64 matrices of a weight's size that singular values take: the difference, its Gram, and LAPACK's copy of that.
SPECTRUM_MATRICES = 3


@dataclass(frozen=True)
class Measure(Encode):
    """The sums of `sums_of` over some rows of W_0 and all W_t, under the name of the tensor."""

    name: str
    entries: tuple[TensorEntry, ...]  # W_0, then all W_t
    label: ClassVar[str] = "measures"

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        """The inner products."""
        return 2 * experts**2 * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        # Differences, W_0 and one W_t in the dtype that is computed in; which elements are 0.
        item = 8 if self.entries[0].dtype == "F64" else 4
        return math.prod(shape) * (item * (experts + 2) + experts)

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        sums = sums_of(inputs[0], inputs[1:])
        if not is_measured(sums):
            for entry, tensor in zip(self.entries, inputs, strict=True):
                check_finite(entry, first_row, tensor, "repair the model first")
            file = self.entries[0].file
            raise NonFiniteError(f"{file}: the deltas of {self.name!r} are too large to be squared; check the models")
        return {self.name: sums}


@dataclass(frozen=True)
class SingularValues(Encode):
    """Singular values of one task vector of a linear weight (of a stack, the first one), descending, in float64."""

    key: str
    label: ClassVar[str] = "singular values"

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        """The Gram, and about 4/3 n^3 for its eigenvalues."""
        short, long = sorted(shape[-2:])
        return 2 * short**2 * long + 4 * short**3 // 3

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return 8 * SPECTRUM_MATRICES * math.prod(shape[-2:])

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        """By the eigenvalues of the smaller Gram: those below 1e-8 of the largest are noise."""
        base, expert = inputs
        tau = expert.to(torch.float64, copy=True).sub_(base).reshape(expert.shape[-2:])
        gram = tau @ tau.mT if tau.shape[0] <= tau.shape[1] else tau.mT @ tau
        del tau
        return {self.key: torch.linalg.eigvalsh(gram).clamp_(min=0.0).sqrt_().flip(0)}


def measure_step(step: Step) -> Step:
    """The step that measures all task vectors of a tensor, piece by piece."""
    step = _apart(step)
    action = Measure(step.name, (step.base, *step.experts))
    return _encoded(step, action, step.experts, tuple(_pieces(step.shape)), sums_bytes(len(step.experts)))


def spectrum_steps(step: Step) -> list[Step]:
    """The steps that find the singular values of a linear weight, one for each task."""
    step = _apart(step)
    stop = 1 if step.role.stacked else step.shape[0]
    whole = Piece(0, stop, (stop, *step.shape[1:]))
    return [
        _encoded(step, SingularValues(spectrum_key(step, task)), (expert,), (whole,), 8 * min(matrix(step)))
        for task, expert in enumerate(step.experts)
    ]


def matrix(step: Step) -> tuple[int, int]:
    """Shape of the weight, or of the first of a stack."""
    return step.shape[-2], step.shape[-1]


def spectrum_key(step: Step, task: int) -> str:
    """Name of the singular values of one task."""
    return f"{step.name}::{task}"


def _apart(step: Step) -> Step:
    """The step with every expert for itself, where a weighted sum of adapters is read as one tensor."""
    return replace(step, experts=of_sum(step.experts[0])[1:]) if is_sum(step.experts[0]) else step


def _encoded(
    step: Step, action: Encode, experts: tuple[TensorEntry, ...], pieces: tuple[Piece, ...], nbytes: int
) -> Step:
    return replace(
        step,
        action=action,
        dtype="F64",
        experts=experts,
        reads_base=True,
        nbytes=nbytes,
        pieces=pieces,
        held=False,
        values=None,
        worker="encode",
        group=None,
    )


def _pieces(shape: tuple[int, ...]) -> Iterator[Piece]:
    """Row ranges of at most PIECE_ELEMENTS, but at least one row."""
    if not shape or shape[0] == 0:
        yield Piece(0, shape[0] if shape else 1, shape)
        return
    each = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], each):
        stop = min(start + each, shape[0])
        yield Piece(start, stop, (stop - start, *shape[1:]))
