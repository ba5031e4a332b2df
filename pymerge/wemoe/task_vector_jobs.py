"""Makes the files of task vectors: a few threads read, some compute, one writes; in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite, is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import code_of, upcast
from pymerge.common.progress import ProgressSink
from pymerge.engine.memory import Heap
from pymerge.engine.trace import Tracer
from pymerge.errors import NonFiniteError
from pymerge.ops._op import compute_dtype, task_vector
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file
from pymerge.planner.jobs import READ_THREADS
from pymerge.planner.window import SMALL_BYTES
from pymerge.wemoe.task_vector_layout import CHUNK_ELEMENTS, Parameter, TaskVectorFile
from pymerge.wemoe.task_vectors import compress, encode

Loads = list[Future[Tensor]]
# The axis along which the tasks of a stored tensor are joined: `left` holds columns of factors.
_COLUMNS = "left"


class TaskVectorRun:
    """Writes files of task vectors into an output.

    What is held at any time are the inputs of the parameter at work and of the next one, scratch, what waits for the
    writer, and, where sizes are not known before, the file at work; together never more than `limit` bytes.
    """

    def __init__(
        self,
        files: Sequence[TaskVectorFile],
        limit: int,
        output: OutputDirectory,
        reader: Reader,
        tracer: Tracer,
        progress: ProgressSink,
        *,
        keeps_cache: bool,
    ) -> None:
        self._queue = deque((file, parameter) for file in files for parameter in file.parameters)
        self._limit = limit
        self._output = output
        self._reader = reader
        self._tracer = tracer
        self._progress = progress
        self._keeps_cache = keeps_cache
        self._held: dict[str, Tensor] = {}  # of the file at work
        self._writes: deque[tuple[Future[None], int]] = deque()
        self._heap = Heap(limit)
        self._threads = torch.get_num_threads()
        # Each computes one task on one thread: threads of a team would wait for each other at every small operation.
        self._workers = ThreadPoolExecutor(self._threads, "pymerge-compute", torch.set_num_threads, (1,))
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="pymerge-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pymerge-write")

    def run(self) -> None:
        """Make all files. The first exception of any thread ends it."""
        loads: Loads | None = None
        try:
            while self._queue:
                file, parameter = self._queue.popleft()
                loads = self._start_reading(parameter) if loads is None else loads
                following = self._queue[0][1] if self._queue else None
                ahead = None
                if following is not None and self._held_bytes + parameter.peak + following.inputs <= self._limit:
                    ahead = self._start_reading(following)
                needed = parameter.peak + (following.inputs if following is not None and ahead else 0)
                self._make_room(needed, parameter.stored_bytes)
                room = self._limit - needed - self._held_bytes - self._waiting_bytes
                self._carry_out(file, parameter, loads, 1 + max(0, room // max(1, parameter.scratch)))
                loads = ahead
                self._heap.freed(parameter.peak)
            while self._writes:
                self._wait_for_writer()
        finally:
            self._readers.shutdown(cancel_futures=True)
            self._workers.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # what later threads start with
            self._writer.shutdown(cancel_futures=True)

    @property
    def _held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def _waiting_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self._writes)

    def _make_room(self, needed: int, results: int) -> None:
        """Wait for the writer until `needed` bytes fit, and no more waits than one parameter's results are."""
        least = max(results, SMALL_BYTES)
        while self._writes and (
            self._waiting_bytes > least or self._held_bytes + self._waiting_bytes + needed > self._limit
        ):
            self._wait_for_writer()

    def _wait_for_writer(self) -> None:
        with self._tracer.span("wait for the writer", ""):
            self._writes.popleft()[0].result()

    def _start_reading(self, parameter: Parameter) -> Loads:
        return [self._readers.submit(self._load, entry) for entry in parameter.entries]

    def _load(self, entry: TensorEntry) -> Tensor:
        with self._tracer.span("read", entry.name, entry.nbytes):
            self._reader.announce(entry)
            tensor = upcast(self._reader.read(entry))
            if not self._keeps_cache:
                self._reader.release(entry)
        self._progress.advance(entry.nbytes)
        return tensor

    def _carry_out(self, file: TaskVectorFile, parameter: Parameter, loads: Loads, at_once: int) -> None:
        """Compute a parameter, `at_once` tasks at a time, and hand it to the writer or hold it."""
        self._progress.tensor(parameter.name)
        with self._tracer.span("wait for inputs", parameter.name):
            base, *experts = [load.result() for load in loads]
        loads.clear()  # futures keep their results
        with self._tracer.span("compute", parameter.name):
            tasks = list(zip(parameter.experts, experts, strict=True))
            parts: list[dict[str, Tensor]] = []
            for start in range(0, len(tasks), at_once):
                group = tasks[start : start + at_once]
                parts += self._workers.map(partial(_one_task, parameter, base), group)
            found = _joined(parts) if not (parameter.dense and file.exact) else {}
        if file.exact:
            for part in [found] if found else parts:
                for name, tensor in part.items():
                    self._write(name, tensor)
        else:
            self._held |= found
            if parameter is file.parameters[-1]:
                self._write_held(file)

    def _write(self, name: str, tensor: Tensor) -> None:
        self._writes.append((self._writer.submit(self._store, name, tensor), tensor.nbytes))

    def _write_held(self, file: TaskVectorFile) -> None:
        """Give the file at work its layout, and its tensors to the writer."""
        self._progress.advance(sum(parameter.stored_bytes for parameter in file.parameters) - self._held_bytes)
        layout = layout_file(file.file, [(name, code_of(each.dtype), each.shape) for name, each in self._held.items()])
        self._writes.append((self._writer.submit(self._output.settle, layout), 0))
        for name, tensor in self._held.items():
            self._write(name, tensor)
        self._held = {}

    def _store(self, name: str, tensor: Tensor) -> None:
        with self._tracer.span("write", name, tensor.nbytes):
            self._output.write(name, tensor)
        self._progress.advance(tensor.nbytes)


def _one_task(parameter: Parameter, base: Tensor, task: tuple[TensorEntry, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of one expert alone."""
    entry, expert = task
    dtype = compute_dtype(base)
    if parameter.dense:
        # By ranges of rows, whose float32 forms stay in the cache.
        values = torch.empty((1, *base.shape), dtype=parameter.storage.torch_dtype)
        rows = max(1, CHUNK_ELEMENTS * base.shape[0] // max(1, base.numel()))
        for start in range(0, base.shape[0], rows):
            part = slice(start, start + rows)
            values[0, part] = task_vector(base[part], expert[part], None, dtype)
        found = {f"{parameter.name}::values": values}
    else:
        tau = task_vector(base, expert, None, dtype)
        _check(parameter, entry, base, expert, tau)
        found = encode(parameter.name, compress([tau], parameter.storage), parameter.storage)
    for tensor in found.values():
        _check(parameter, entry, base, expert, tensor)
    return found


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The stored tensors of all experts, from those of each in their order."""
    return {
        name: torch.cat([part[name] for part in parts], 1 if name.endswith(f"::{_COLUMNS}") else 0) for name in parts[0]
    }


def _check(parameter: Parameter, entry: TensorEntry, base: Tensor, expert: Tensor, found: Tensor) -> None:
    """Raise NonFiniteError, with file and tensor, unless what was made of an expert is finite."""
    if is_finite(found):
        return
    for source, tensor in ((parameter.base, base), (entry, expert)):
        check_finite(source, 0, tensor, "use a sound checkpoint: its task vectors are mixed into every output")
    raise NonFiniteError(
        f"{entry.file}: the task vector of {entry.name!r} has values that {parameter.storage.dtype} cannot hold; "
        "choose storage dtype bfloat16 or float32"
    )
