"""Factors of adapters' tensors, for the jobs that add their product to rows of the base."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array
from pymerge.ops.low_rank_sum import Panels
from pymerge.planner.added import Added
from pymerge.planner.jobs import Job
from pymerge.planner.steps import Step


class FactorsOfSteps:
    """Reads rows of left factors for each job, and right factors once for all jobs of a step, until it is to `forget`
    them. By any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._rights: dict[tuple[int, TensorEntry], Future[Panels]] = {}  # by step and input

    def of(self, job: Job, entry: TensorEntry, made: Added) -> tuple[Array, Panels, float]:
        """Left and right factor of an input's product for a job's rows, in the dtype of the sum, and its scale."""
        key = id(job.step), entry
        with self._lock:
            right = self._rights.get(key)
            mine = right is None
            if right is None:
                right = self._rights[key] = Future()
        if mine:
            try:
                right.set_result(made.right(self._reader.read_bytes))
            except BaseException as error:
                right.set_exception(error)
        left, scale = made.left(self._reader.read_bytes, job.piece.start, job.piece.stop)
        return left, right.result(), scale

    def forget(self, step: Step) -> None:
        """A tensor is done."""
        with self._lock:
            for key in [key for key in self._rights if key[0] == id(step)]:
                del self._rights[key]

    def clear(self) -> None:
        """Forget all; what is needed is read again."""
        with self._lock:
            self._rights.clear()
