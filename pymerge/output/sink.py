"""Sink of a run: files of an output, written into its work folder, each recorded there when it is whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.common.events import event
from pymerge.common.files import os_errors
from pymerge.errors import OutputError
from pymerge.output.contents import Contents
from pymerge.output.files import WORK_FOLDER
from pymerge.output.layout import ShardLayout
from pymerge.output.records import Record, save_record
from pymerge.output.shard import ShardFile, Task
from pymerge.output.work import partial_name, remove_stale, work_name

if TYPE_CHECKING:
    import torch


def internal(message: str) -> OutputError:
    """Error for what only a mistake of ours can bring about."""
    return OutputError(f"internal error: {message}; please report this")


class ShardSink:
    """Writer of files into the work folder of `path`. `finished` are those that are whole.

    One thread calls `take` and `settle`, any do what `take` returns; none is under way when `discard` is called.

    `identity` is the digest of what the merge is made of, which records have.
    """

    def __init__(
        self, path: Path, contents: Contents, identity: str, finished: dict[str, Record], *, keeps_cache: bool
    ) -> None:
        self.finished = finished
        self._path = path
        self._work = path / WORK_FOLDER
        self._contents = contents
        self._identity = identity
        self._keeps_cache = keeps_cache
        self._active: dict[str, ShardFile] = {}

    def settle(self, layout: ShardLayout) -> None:
        """Say what a late file holds, before its first tensor is written."""
        if layout.file not in self._contents.late or layout.file in self._contents.layouts:
            raise internal(f"{self._path}: {layout.file} is not a file that has yet to get its layout")
        self._contents.place(layout)
        self.finish_empty([layout.file])

    def take(self, tensor_name: str, data: torch.Tensor | memoryview) -> Sequence[Task]:
        """Take the next piece of a tensor, by its full name: a CPU tensor of the planned dtype, or raw bytes.

        Pieces of one tensor come in order, tensors in any order. Returns what is left to do, in any order; until all
        of it is done, `data` must stay as it is. What ends a shard syncs it, and records it as finished. It raises
        OutputError when writing fails, and so does this when the pieces do not fit the plan; then the partial shard is
        removed.
        """
        if tensor_name not in self._contents.places:
            raise internal(f"{self._path}: tensor {tensor_name} is not in the plan")
        layout, tensor = self._contents.places[tensor_name]
        if not isinstance(data, memoryview):
            from pymerge.common.dtypes import bytes_of, code_of

            if data.device.type != "cpu" or code_of(data.dtype) != tensor.dtype:
                found = f"is {data.dtype} on {data.device}, planned {tensor.dtype} on cpu"
                raise internal(f"{self._path}: tensor {tensor_name} {found}")
            data = bytes_of(data.contiguous())
        if data.nbytes == 0:
            return ()
        if layout.file in self.finished:
            raise internal(f"{self._path}: tensor {tensor_name} is in {layout.file}, which is finished")
        if layout.file not in self._active:
            self._active[layout.file] = self._shard_file(layout)
        shard = self._active[layout.file]
        return [
            task._replace(run=partial(self._run, layout, shard, task)) for task in shard.take(tensor, data.cast("B"))
        ]

    def _run(self, layout: ShardLayout, shard: ShardFile, task: Task) -> None:
        task.run()
        if shard.ended():
            self._finish(layout)

    def finish_empty(self, files: Iterable[str]) -> None:
        """Finish those of these files that have empty tensors only: nothing is going to be written."""
        for layout in (self._contents.layouts[file] for file in files if file in self._contents.layouts):
            if layout.nbytes == len(layout.header):
                self._finish(layout)

    def discard(self) -> None:
        """Remove what is not whole."""
        for shard in self._active.values():
            shard.discard()
        self._active.clear()

    def _finish(self, layout: ShardLayout) -> None:
        file = layout.file
        shard = self._active.get(file)
        if shard is None:
            shard = self._shard_file(layout)
        digests = shard.finish(self._work / work_name(file))
        self._active.pop(file, None)
        self.finished[file] = save_record(self._work, file, self._identity, digests, time.monotonic() - shard.began)
        event("shard_finished", f"{file}: finished", level=logging.DEBUG, file=file, bytes=layout.nbytes)

    def _shard_file(self, layout: ShardLayout) -> ShardFile:
        with os_errors(self._work, "removing what a killed run has left"):
            remove_stale(self._work, layout.file)
        return ShardFile(layout, self._work / partial_name(layout.file), keeps_cache=self._keeps_cache)
