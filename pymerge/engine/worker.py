"""Workers: what carries out the jobs of some steps; what they share and make, and how they say what went wrong."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from pymerge.backends.runner import Runner
from pymerge.checkpoint.finite import check_finite, is_finite, overflow
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.devices import Device
from pymerge.common.progress import ProgressSink
from pymerge.engine.trace import Tracer
from pymerge.errors import ArgumentError, BackendError
from pymerge.methods.reduce import Reduce, Reduction
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import Batch, Job

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.common.arrays import ArrayLike


# What RuntimeErrors say where memory ran out. Pinned memory and kernels' launches fail as CUDA itself does, Triton's by
# the driver's words; libraries that cannot allocate what they need at their start say that they have not started.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    *(f"{name}_STATUS_{why}" for name in ("CUBLAS", "CUSOLVER") for why in ("ALLOC_FAILED", "NOT_INITIALIZED")),
)


class Sink(Protocol):
    """Taker of what is made: pieces of a tensor come in their order, all by one thread."""

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Take the next bytes of a tensor, a contiguous tensor on the CPU or its memory.

        Returns what is left to do, in any order and by any threads; the data is valid until that is done.
        """

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file that nobody could plan, before its first tensor."""


class Store(Protocol):
    """Place for what a worker has made: the writers."""

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Have the next bytes of a tensor written; they must stay as they are until `wait`, or the end of the job."""

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file that nobody could plan, before its first tensor."""

    def wait(self) -> None:
        """Wait until all is done with what `write` was given."""


@dataclass(frozen=True)
class Context:
    """All that the workers of a run share: inputs, ops, who is told of the work, and the config's wishes."""

    run: Runner
    reader: Reader
    tracer: Tracer
    progress: ProgressSink
    allow_nonfinite: bool
    keeps_cache: bool


@dataclass(frozen=True)
class Encoded:
    """Tensors that were made of one tensor, or all of a file, with its layout, where nobody could plan it."""

    tensors: dict[str, Tensor]
    layout: ShardLayout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Made(NamedTuple):
    """Result of one job: what is written, a contribution to a pass, or nothing yet."""

    merged: ArrayLike | Encoded | None
    mapped: Any = None
    reading: int = 0  # nanoseconds that a pooled job spent in reads
    computing: int = 0  # the others of a pooled job


class Worker(Protocol):
    """Way to carry out the jobs of some steps. The leading thread calls all but `store`, for batches in their order."""

    def start(self, job: Job) -> Future[Any]:
        """Start what may be done before the job's turn: reading, or all of it. An error waits for its turn."""

    def finish(self, batch: Batch, started: list[Future[Any]]) -> list[Made]:
        """Complete a batch in its turn; `started` is of each job, or empty where nothing was; it is emptied.

        Raises MemoryError, RuntimeError of PyTorch where its memory runs out, CheckpointError, NonFiniteError.
        """

    def store(self, job: Job, merged: Any, store: Store) -> None:
        """Have what a job has made written; by the thread that hands it on."""

    def reuse(self, merged: Any) -> None:
        """Nobody uses any more what a job has made."""

    def freed(self, batch: Batch) -> None:
        """A batch has had its turn."""

    def free(self) -> None:
        """Give back all memory that no job is using, as far as it can be made again."""

    def close(self) -> None:
        """End the worker's threads."""


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
        check_input(reader, entry, piece.start, reader.read(entry, *rows_read(job)))
    raise overflow(step.name, step.dtype)


def check_input(reader: Reader, entry: TensorEntry, start_row: int, tensor: Tensor) -> None:
    """Raise NonFiniteError unless rows of an input are finite; of an adapter it names the factor that is not."""
    if not is_finite(tensor):
        for part in entry.adapter_parts:
            check_finite(part, 0, reader.read(part))
        check_finite(entry, start_row, tensor)


def rows_read(job: Job) -> tuple[int, ...]:
    """First row of a job's piece, and the one behind its last, for a Reader; scalars have none."""
    return (job.piece.start, job.piece.stop) if job.step.shape else ()


def failed(error: BaseException) -> Future[Any]:
    """A job that could not be started: the error is raised in its turn."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on CUDA that is a class of PyTorch's where its allocator says so, and a RuntimeError like
    any other where CUDA, its libraries or a kernel's launch do; on the CPU one of PyTorch's allocator."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in _OUT_OF_MEMORY)


@contextmanager
def blaming(name: str, what: str, device: Device) -> Iterator[None]:
    """Turn PyTorch's errors about a tensor into BackendError, also CUDA's, which tells what has failed to whoever waits
    next; but for memory that ran out, which has remedies."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        remedy = "try --backend reference, and report this"
        raise BackendError(f"{name}: {what} failed on {device} ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]
