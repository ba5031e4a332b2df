"""Times of a merge: spans of work on each thread, their overlap, slowest steps; a trace for Perfetto, and events."""

from __future__ import annotations

import heapq
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import DEBUG
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TextIO

from pymerge.common.events import event
from pymerge.errors import OutputError
from pymerge.planner.jobs import Job

# Reading and writing files is what the pipeline hides behind computing. A copy moves a tensor to or from a CUDA
# device, inside a read or before a write. "hand on" is all that a sink does at once with a piece, "write" and "hash"
# are what it leaves to pools. Steps are those of the computing thread, which waits or computes in them. "combine" reads
# and computes, block by block; "encode" and "core" compute, beside the computing thread, and so does "solve" what that
# thread waits for in a "compute".
Kind = Literal[
    "step",
    "read",
    "write",
    "hash",
    "hand on",
    "copy",
    "compute",
    "solve",
    "combine",
    "encode",
    "core",
    "wait for inputs",
    "wait for the writer",
]
_IO = frozenset(("read", "write", "combine"))
_COMPUTING = frozenset(("compute", "combine", "encode", "core"))
_PROCESS = {"name": "pymerge"}


def _nvtx() -> Any:
    from torch.cuda import nvtx  # PyTorch gives its functions no types

    return nvtx


class Times(NamedTuple):
    """Seconds of the thread that leads a merge."""

    reading: float  # waiting for inputs
    computing: float
    writing: float  # and waiting for the writer


@dataclass(frozen=True)
class StepTime:
    """Seconds spent on one tensor, added up over threads; what is read and computed block by block is computing."""

    name: str
    reading: float
    computing: float
    writing: float

    @property
    def total(self) -> float:
        return self.reading + self.computing + self.writing


class Tracer:
    """Takes spans of work from any thread. Keeps sums; with a path, writes each span to a file as it ends.

    The file is in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing show; spans of one thread
    are disjoint or nested. Memory does not grow with the number of spans, only with that of tensors. With `nvtx`,
    spans are NVTX ranges too. A context manager: the file is whole when it ends.
    """

    def __init__(self, path: Path | None = None, *, nvtx: bool = False) -> None:
        self._path = path
        self._nvtx = _nvtx() if nvtx else None
        self._lock = threading.Lock()
        self._started = self._changed = time.perf_counter_ns()  # changed: when a span began or ended last
        self._io = self._computing = 0  # spans under way that do either
        self._totals: dict[str, int] = {}  # ns by kind
        self._io_ns = self._hidden_ns = 0
        self._steps: dict[str, dict[str, int]] = {}  # ns by tensor and kind
        self._threads: dict[int, int] = {}  # identity -> number in the trace
        self._file: TextIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Tracer:
        if self._path is not None:
            with self._errors():
                self._file = self._stack.enter_context(open(self._path, "w", encoding="utf-8"))
                self._file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock, self._errors():
            if self._file is not None:
                self._file.write(json.dumps({"name": "process_name", "ph": "M", "pid": os.getpid(), "args": _PROCESS}))
                self._file.write("\n]}\n")
            self._file = None
            self._stack.close()

    @contextmanager
    def span(self, kind: Kind, name: str, nbytes: int = 0) -> Iterator[None]:
        """A span of work on this thread: on the tensor `name`, moving `nbytes` bytes."""
        if self._nvtx is not None:
            self._nvtx.range_push(f"{kind} {name}")
        began = self._change(kind, 1)
        try:
            yield
        finally:
            ended = self._change(kind, -1, name, began)
            if self._nvtx is not None:
                self._nvtx.range_pop()
            if self._file is not None:
                self._write(kind, name, began, ended, nbytes)

    def _change(self, kind: str, count: int, name: str = "", began: int = 0) -> int:
        """A span begins (1) or ends (-1) now; returns the time."""
        with self._lock:
            now = time.perf_counter_ns()
            if self._io:
                self._io_ns += now - self._changed
                if self._computing:
                    self._hidden_ns += now - self._changed
            self._changed = now
            if kind in _IO:
                self._io += count
            if kind in _COMPUTING:
                self._computing += count
            if count < 0:
                self._totals[kind] = self._totals.get(kind, 0) + now - began
                step = self._steps.setdefault(name, {})
                step[kind] = step.get(kind, 0) + now - began
        return now

    def _write(self, kind: str, name: str, began: int, ended: int, nbytes: int) -> None:
        with self._lock, self._errors():
            if self._file is None:  # closed meanwhile
                return
            thread = threading.current_thread()
            number = self._threads.setdefault(threading.get_ident(), len(self._threads))
            place = {"pid": os.getpid(), "tid": number}
            line = {"name": name, "cat": kind, "ph": "X", "ts": (began - self._started) / 1e3} | place
            line |= {"dur": (ended - began) / 1e3, "args": {"kind": kind, "bytes": nbytes}}
            label = {"name": "thread_name", "ph": "M", "args": {"name": thread.name}} | place
            self._file.write(f"{json.dumps(line)},\n{json.dumps(label)},\n")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._path}: the profile cannot be written ({error.strerror}); give another path"
            ) from error

    def seconds(self, kind: Kind) -> float:
        """Time of all spans of a kind, added up over threads."""
        return self._totals.get(kind, 0) / 1e9

    @property
    def overlap(self) -> float:
        """Share, of the time in which anything was read or written, in which something was computed too."""
        return self._hidden_ns / self._io_ns if self._io_ns else 0.0

    def slowest(self, count: int = 10) -> tuple[StepTime, ...]:
        """The tensors that took longest, the slowest first."""
        times = (
            StepTime(
                name,
                reading=kinds.get("read", 0) / 1e9,
                computing=sum(kinds.get(kind, 0) for kind in _COMPUTING) / 1e9,
                writing=(kinds.get("write", 0) + kinds.get("hand on", 0)) / 1e9,
            )
            for name, kinds in self._steps.items()
        )
        return tuple(heapq.nlargest(count, times, key=lambda step: step.total))


class StepLog:
    """Events of steps, whose pieces begin and end in order: when the first piece begins, when the last one is done."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}  # of the steps that are being carried out

    def begins(self, job: Job) -> None:
        if job.starts_step:
            name = job.step.name
            self._began[name] = time.perf_counter()
            event("step_started", name, level=DEBUG, tensor=name, action=job.step.action.label)

    def ends(self, job: Job) -> None:
        step = job.step
        if job.ends_step:
            size = {"bytes_read": step.bytes_read, "bytes_written": step.nbytes}
            seconds = time.perf_counter() - self._began.pop(step.name)
            event("step_finished", step.name, level=DEBUG, tensor=step.name, seconds=seconds, **size)
