"""Workers: what carries out jobs, in native code or in PyTorch; what they make, and how they say what went wrong."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from pymerge.checkpoint.finite import check_finite, overflow
from pymerge.checkpoint.reader import Reader
from pymerge.errors import ArgumentError
from pymerge.methods.reduce import Reduce, Reduction
from pymerge.planner.jobs import Job

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.common.arrays import ArrayLike


class Sink(Protocol):
    """Taker of merged pieces: those of a tensor come in their order, by one thread."""

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Take the next bytes of a tensor, a contiguous tensor on the CPU or its memory; valid until this returns."""


class Made(NamedTuple):
    """Result of one job: merged rows, or a contribution to a pass."""

    merged: ArrayLike | None
    mapped: Any = None
    reading: int = 0  # nanoseconds that a native job spent in reads


class Reductions:
    """States of the reductions that have begun.

    `start`, `add` and `end` are called by the leading thread, for jobs in their order; `of` by any.
    """

    def __init__(self) -> None:
        self._states: dict[Hashable, Reduction] = {}

    def start(self, job: Job) -> None:
        """A job will be worked on: its reduction has begun."""
        step = job.step
        if job.reduces and job.reduction not in self._states:
            assert isinstance(step.action, Reduce)
            shape = step.shape if step.group is None else (step.group.numel,)
            self._states[job.reduction] = step.action.start(shape, len(step.experts))

    def of(self, job: Job) -> Reduction:
        """The state that a job maps or merges by."""
        return self._states[job.reduction]

    def add(self, job: Job, mapped: Any) -> None:
        """Take in what a job of a pass that maps has made. Raises ArgumentError, which names its tensor."""
        state = self._states[job.reduction]
        try:
            state.add(job.first, mapped)
            if job.ends_pass:
                state.end_pass()
        except ArgumentError as error:
            raise ArgumentError(f"{job.step.name}: {error}") from error

    def end(self, job: Job) -> None:
        """A job is done; the state of its tensor goes with the last one."""
        if job.reduces and job.ends_step and job.step.group is None:
            del self._states[job.reduction]


def raise_nonfinite(job: Job, reader: Reader) -> NoReturn:
    """Raise NonFiniteError, which names file and tensor if an input of the job holds NaN or infinity."""
    step, piece = job.step, job.piece
    for entry in step.inputs:
        check_finite(entry, piece.start, reader.read(entry, *rows_read(job)))
    raise overflow(step.name, step.dtype)


def rows_read(job: Job) -> tuple[int, ...]:
    """First row of a job's piece, and the one behind its last, for a Reader; scalars have none."""
    return (job.piece.start, job.piece.stop) if job.step.shape else ()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on CUDA that is a class of PyTorch's, on the CPU a RuntimeError of its allocator."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return True
    return type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]
