"""Writers: a thread hands what is made to the sink in its order; pools of threads write and hash it in any order."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from pymerge.common.progress import ProgressSink
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Sink, Worker
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import WRITE_THREADS, Job

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that are written and hashed sooner than other threads have been told to.
_LITTLE = 2**17


class Writing:
    """Result of a job, with the writers."""

    def __init__(self, worker: Worker, merged: Any, *, native: bool) -> None:
        self.nbytes: int = merged.nbytes
        self.native = native
        self._worker = worker
        self._merged = merged
        self._handed: Future[list[Future[None]]] = Future()  # over to the sink, with the tasks that are left

    def handed_by(self, future: Future[list[Future[None]]]) -> None:
        self._handed = future

    @property
    def done(self) -> bool:
        """Whether nobody needs to be waited for."""
        return self._handed.done() and (
            self._handed.exception() is not None or all(task.done() for task in self._handed.result())
        )

    def end(self) -> None:
        """Wait until it is written; its memory is then used again. Raises the first error."""
        for task in self._handed.result():
            task.result()
        self._worker.reuse(self._merged)


class Writers:
    """Pools that write, and compute checksums, beside the thread that hands pieces to the sink, one after the other.

    They are a sink for workers, too: what they are given there is under way when `write` returns. After the first
    error nothing else is done.

    Args:
        hashing: most threads that hash.
    """

    def __init__(self, sink: Sink, tracer: Tracer, progress: ProgressSink, hashing: int) -> None:
        self._sink = sink
        self._tracer = tracer
        self._progress = progress
        self._failed = False
        self._tasks: list[Future[None]] = []  # of the piece that is handed on
        self._order = ThreadPoolExecutor(1, "pymerge-hand-on")
        self._pools = {
            "write": ThreadPoolExecutor(WRITE_THREADS, "pymerge-write"),
            "hash": ThreadPoolExecutor(hashing, "pymerge-hash"),
        }

    def submit(self, worker: Worker, job: Job, merged: Any) -> Writing:
        """Have what a job has made written."""
        writing = Writing(worker, merged, native=job.step.worker == "native")
        writing.handed_by(self._order.submit(self._hand_on, worker, job, merged, writing.nbytes))
        return writing

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Have the next bytes of a tensor written; they must stay as they are until `wait` or the end of the job."""
        with self._tracer.span("hand on", tensor_name):
            tasks = self._sink.take(tensor_name, data)
        for task in tasks:
            if task.nbytes <= _LITTLE:
                self._run(tensor_name, task)
            else:
                self._tasks.append(self._pools[task.kind].submit(self._run, tensor_name, task))

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file that nobody could plan, before its first tensor."""
        self._sink.settle(layout)

    def wait(self) -> None:
        """Wait until all is done with what `write` was given."""
        wait(self._tasks)

    def close(self) -> None:
        """End the threads, when all that they were given is done: the next run need not make it again."""
        self._order.shutdown()
        for pool in self._pools.values():
            pool.shutdown()

    def _hand_on(self, worker: Worker, job: Job, merged: Any, nbytes: int) -> list[Future[None]]:
        """Give what a job has made to the sink, unless one before it could not be written; returns what is left."""
        self._tasks = []
        if not self._failed:
            try:
                worker.store(job, merged, self)
            except BaseException:
                self._failed = True
                raise
            self._progress.advance(nbytes)
        return self._tasks

    def _run(self, name: str, task: Task) -> None:
        """Do a task; by any thread."""
        if self._failed:
            return
        try:
            with self._tracer.span(task.kind, name, task.nbytes):
                task.run()
        except BaseException:
            self._failed = True
            raise
