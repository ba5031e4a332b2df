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
    """Reads rows of left factors for each job, and right factors once for all jobs of a step: they go with the last of
    its pieces, whose turn may come later. By any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._rights: dict[tuple[int, int], Future[Panels]] = {}  # by step and input, which live as long
        self._left: dict[tuple[int, int], int] = {}  # pieces that have not asked for them

    def of(self, job: Job, entry: TensorEntry, made: Added) -> tuple[Array, Panels, float]:
        """Left and right factor of an input's product for a job's rows, in the dtype of the sum, and its scale."""
        key = id(job.step), id(entry)
        with self._lock:
            right = self._rights.get(key)
            mine = right is None
            if right is None:
                right = self._rights[key] = Future()
                self._left[key] = len(job.step.pieces)
            self._left[key] -= 1
            if self._left[key] == 0:
                del self._rights[key], self._left[key]
        if mine:
            try:
                right.set_result(made.right(self._reader.read_bytes))
            except BaseException as error:
                right.set_exception(error)
        left, scale = made.left(self._reader.read_bytes, job.piece.start, job.piece.stop)
        return left, right.result(), scale

    def forget(self, step: Step) -> None:
        """A tensor is done, also where its pieces were others than planned."""
        with self._lock:
            for key in [key for key in self._rights if key[0] == id(step)]:
                del self._rights[key], self._left[key]

    def clear(self) -> None:
        """Forget all; what is needed is read again."""
        with self._lock:
            self._rights.clear()
            self._left.clear()
