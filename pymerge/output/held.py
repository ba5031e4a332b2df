"""An output directory while this process holds its lock: what alone and shared holders have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pymerge.common.files import free_bytes, fsync_directory, os_errors
from pymerge.errors import OutputError
from pymerge.output.claim import State, check_claim, clear_work
from pymerge.output.contents import Contents
from pymerge.output.files import WORK_FOLDER
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout
from pymerge.output.records import Record, identity_digest
from pymerge.output.shard import Task
from pymerge.output.sink import ShardSink, internal
from pymerge.output.work import LOCK_NAME

if TYPE_CHECKING:
    import torch

# Written at the start and not when a run fails, so that a killed run leaves it too.
NOTE = b"""\
This folder belongs to a pymerge run that has not finished. If none is running:
- to go on, run the same pymerge command again; whole shards, which have a record (.json), are kept;
- of a merge in parts, run those that are missing, then pymerge finalize;
- to give up, delete this folder, or give --overwrite with another merge.
"""


class HeldDirectory(ABC):
    """An output directory, its lock, and the sink of what is written there. It is a context that ends in `abandon`."""

    def __init__(
        self,
        path: Path | str,
        layouts: Sequence[ShardLayout],
        identity: Identity,
        beside: Sequence[ShardLayout],
        late: Mapping[str, int],
        interim: Mapping[str, int],
        keeps_cache: bool,
    ) -> None:
        self.path = Path(path)
        self.layouts = tuple(layouts)
        self.identity = dict(identity)
        self._digest = identity_digest(self.identity)
        self._work = self.path / WORK_FOLDER
        self._contents = Contents(self.layouts, beside, late, interim)
        self._keeps_cache = keeps_cache
        self._created: list[Path] = []  # directories made by this run, outermost first
        self._lock: FileIO | None = None
        self._state: State | None = None  # set while the directory is ours, and so is the sink
        self._sink: ShardSink | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    @property
    def finished(self) -> frozenset[str]:
        """Shard files that are whole and need not be written again."""
        return frozenset(self._own_sink().finished)

    def settle(self, layout: ShardLayout) -> None:
        """Say what a late file holds, before its first tensor is written."""
        self._own_sink().settle(layout)

    def take(self, tensor_name: str, data: torch.Tensor | memoryview) -> Sequence[Task]:
        """Take the next piece of a tensor, and say what is left to do, as `ShardSink.take` does."""
        return self._own_sink().take(tensor_name, data)

    def write(self, tensor_name: str, data: torch.Tensor | memoryview) -> None:
        """Take the next piece of a tensor, and do all that is to be done with it."""
        for task in self.take(tensor_name, data):
            task.run()

    @abstractmethod
    def abandon(self) -> None:
        """Stop writing, and give the lock back."""

    def _own(self, state: State, finished: dict[str, Record]) -> None:
        """Note that the directory is ours."""
        self._sink = ShardSink(self.path, self._contents, self._digest, finished, keeps_cache=self._keeps_cache)
        self._state = state

    def _own_state(self) -> State:
        if self._state is None:
            raise internal(f"{self.path}: the output directory is not open")
        return self._state

    def _own_sink(self) -> ShardSink:
        if self._sink is None:
            raise internal(f"{self.path}: the output directory is not open")
        return self._sink

    def _create_directory(self) -> None:
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise OutputError(f"{self.path}: is a file; give a directory")
        with os_errors(self.path, "creating the directory"):
            for folder in [*reversed(self.path.parents), self.path]:
                if not os.path.exists(folder):
                    try:
                        folder.mkdir()
                    except FileExistsError:  # another process was quicker
                        continue
                    self._created.append(folder)
                    fsync_directory(folder.parent)

    def _check_claim(self, overwrite: bool, *, part: bool = False) -> State | None:
        return check_claim(self.path, self.identity, self._contents.files, overwrite=overwrite, part=part)

    def _check_space(self, files: Collection[str], copied: int = 0, reclaimed: int = 0) -> None:
        """Raise OutputError unless there is space for these files and what is copied, with bytes that will be free."""
        needed = sum(self._contents.size(file) for file in files) + copied
        with os_errors(self.path, "asking for free space"):
            free = free_bytes(self.path) + reclaimed
        if needed > free:
            raise OutputError(
                f"{self.path}: not enough space: needs {needed:,} bytes, {free:,} bytes free; "
                "free some space or choose another disk"
            )

    def _remove_work(self, state: State | None) -> None:
        """Remove what `state` lists from the work folder, then lock and folder if nothing else is in it."""
        try:
            with os_errors(self._work, "removing the work folder"):
                if state is not None:
                    clear_work(self._work, state)
                # Where a signal came at the end of this, it is done once more, and the folder is gone.
                if self._lock is not None and self._work.is_dir() and os.listdir(self._work) == [LOCK_NAME]:
                    (self._work / LOCK_NAME).unlink()
                    self._work.rmdir()
        finally:
            self._release()

    def _remove_created(self) -> None:
        while self._created:
            try:
                self._created.pop().rmdir()
            except OSError:  # somebody else has put something there since
                self._created.clear()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # may be done twice: a signal may come before the next line
            self._lock = None
