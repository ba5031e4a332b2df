"""Write an output directory: shards at planned offsets, resume after a kill, visible only when all is whole.

Until `publish`, everything lies in the hidden folder `.pymerge` of the output, so that nothing takes a
half-written directory for a model:

    OUT/.pymerge/lock                  held (flock) by the run that writes here
    OUT/.pymerge/state.json            whose merge this is and which shards are whole
    OUT/.pymerge/<shard>.partial       being written, at full size from the start
    OUT/.pymerge/<shard>               whole, synced, its tensors' sha256 in state.json
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pymerge.common.events import event
from pymerge.common.files import free_bytes, fsync_directory, install, os_errors
from pymerge.errors import OutputError
from pymerge.output.claim import (
    LOCK_NAME,
    NOTE_NAME,
    TEMPORARY_NAME,
    State,
    acquire_lock,
    check_claim,
    clear_work,
    earlier_bytes,
    partial_name,
    remove_earlier,
    work_name,
)
from pymerge.output.contents import Contents, drop_damaged
from pymerge.output.files import WORK_FOLDER
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout
from pymerge.output.publish import check_names, publish_files
from pymerge.output.shard import ShardFile

if TYPE_CHECKING:
    import torch

# Written at the start and not when a run fails, so that a killed run leaves it too.
_NOTE = b"""\
This folder belongs to a pymerge run that has not finished. If none is running:
- to go on, run the same pymerge command again; whole shards (see state.json) are kept;
- to give up, delete this folder, or give --overwrite with another merge.
"""


def _internal(message: str) -> OutputError:
    return OutputError(f"internal error: {message}; please report this")


class OutputDirectory:
    """An output directory that belongs to this process between `open` and `publish` or `abandon`.

    `layouts` are the weight files of the model, `beside` other files of tensors. Those of `late`, which maps their
    names to the bytes to set aside for them, get their layout by `settle`, when their content is known. So do those of
    `interim`, which are never published: what an interrupted run need not work out again. `copied` are the bytes of
    files that `publish` copies. `identity` is what the merge is made of: a run with the same one goes on
    where an earlier run stopped. Not thread-safe: one thread writes. As a context manager it opens, and abandons what
    was not published. Without `keeps_cache`, what is written goes to the disk at once and does not stay in the page
    cache.
    """

    def __init__(
        self,
        path: Path | str,
        layouts: Sequence[ShardLayout],
        *,
        identity: Identity,
        beside: Sequence[ShardLayout] = (),
        late: Mapping[str, int] | None = None,
        interim: Mapping[str, int] | None = None,
        copied: int = 0,
        overwrite: bool = False,
        keeps_cache: bool = True,
    ) -> None:
        self.path = Path(path)
        self.layouts = tuple(layouts)
        self.identity = dict(identity)
        self.overwrite = overwrite
        self.keeps_cache = keeps_cache
        self._work = self.path / WORK_FOLDER
        self._contents = Contents(self.layouts, beside, late or {}, interim or {})
        self._copied = copied
        self._active: dict[str, ShardFile] = {}
        self._created: list[Path] = []  # directories made by this run, outermost first
        self._lock: FileIO | None = None
        self._state: State | None = None  # set while the directory is ours

    def __enter__(self) -> OutputDirectory:
        return self.open() if self._lock is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    @property
    def finished(self) -> frozenset[str]:
        """Shard files that are whole and need not be written again."""
        return frozenset(self._own_state().finished)

    @property
    def beside(self) -> tuple[ShardLayout, ...]:
        """Layouts of the files that are not the model's, in their order; of late ones those that are settled."""
        return self._contents.beside

    def place_of(self, file: str) -> Path:
        """Path of an interim file that is finished, until `publish`."""
        return self._work / work_name(file)

    @property
    def checksums(self) -> dict[str, dict[str, str]]:
        """sha256 (hex) of every tensor of the finished shards: file -> tensor -> digest."""
        return {file: dict(digests) for file, digests in self._own_state().finished.items()}

    def open(self) -> OutputDirectory:
        """Take the directory: create, lock, check, resume or clear it, and check the disk space.

        Raises OutputError when it is a file, is in use by another run, holds anything that is not of this
        merge, or when the disk is too full; the directory is then as it was before.
        """
        try:
            self._create_directory()
            if self._work.is_symlink() or not os.path.exists(self._work):
                self._check_claim()  # before anything is changed
            self._lock = acquire_lock(self.path)
            state = self._check_claim()
            if state is None:
                self._check_space(self._contents.files, earlier_bytes(self.path))
                remove_earlier(self.path)
                state = State(self.identity, self._contents.files)
                state.save(self._work)
            self._state = state
            install(_NOTE, self._work / NOTE_NAME, self._work / TEMPORARY_NAME)
            with os_errors(self._work, "resuming"):
                drop_damaged(self.path, self._contents, state)
            unfinished = [file for file in self._contents.files if file not in state.finished]
            self._check_space(unfinished, 0)
            for file in unfinished:
                if file not in self._contents.late:
                    self._finish_empty(self._contents.layouts[file])
        except BaseException:
            self.abandon()
            raise
        return self

    def settle(self, layout: ShardLayout) -> None:
        """Say what a late file holds, before its first tensor is written."""
        if layout.file not in self._contents.late or layout.file in self._contents.layouts:
            raise _internal(f"{self.path}: {layout.file} is not a file that has yet to get its layout")
        self._contents.place(layout)
        self._finish_empty(layout)

    def write(self, tensor_name: str, data: torch.Tensor | memoryview) -> None:
        """Append the next piece of a tensor, by its full name: a CPU tensor of the planned dtype, or raw bytes.

        Pieces of one tensor come in order, tensors in any order. A shard that has all its bytes is synced and
        recorded as finished. Raises OutputError when writing fails (the partial shard is removed) or when the
        pieces do not fit the plan.
        """
        state = self._own_state()
        if tensor_name not in self._contents.places:
            raise _internal(f"{self.path}: tensor {tensor_name} is not in the plan")
        layout, tensor = self._contents.places[tensor_name]
        if not isinstance(data, memoryview):
            from pymerge.common.dtypes import bytes_of, code_of

            if data.device.type != "cpu" or code_of(data.dtype) != tensor.dtype:
                raise _internal(
                    f"{self.path}: tensor {tensor_name} is {data.dtype} on {data.device}, planned {tensor.dtype} on cpu"
                )
            data = bytes_of(data.contiguous())
        if data.nbytes == 0:
            return
        if layout.file in state.finished:
            raise _internal(f"{self.path}: tensor {tensor_name} is in {layout.file}, which is finished")
        if layout.file not in self._active:
            self._active[layout.file] = self._shard_file(layout)
        shard = self._active[layout.file]
        shard.write(tensor, data.cast("B"))
        if shard.complete:
            self._finish(layout)

    def publish(
        self, files: Mapping[str, bytes | Path], manifest: Mapping[str, Any], *, last: str | None = None
    ) -> None:
        """Make the output visible: shards, `files` (name -> content, or a file to copy), manifest, index.

        Names are relative, with "/". What makes the directory a model (the index, or the single weight file)
        comes last, and after it only the file named `last`, if there is one. After a kill in between, opening the
        same merge and publishing again completes it. Raises OutputError when a shard is unfinished, a name is not
        allowed or writing fails, and CheckpointError when a file to be copied is not what the manifest says.
        """
        state = self._own_state()
        unfinished = [file for file in self._contents.files if file not in state.finished]
        if unfinished:
            raise _internal(f"{self.path}: {len(unfinished)} shards are unfinished, {unfinished[0]} among them")
        state.publishing = check_names(self.path, self.layouts, self.beside, files)
        state.save(self._work)
        publish_files(self.path, self.layouts, self.beside, files, manifest, last)
        self._state = None
        self._created.clear()
        self._remove_work(state)

    def abandon(self, *, keep: bool = True) -> None:
        """Stop writing. Finished shards are kept for the next run, beside a note how to go on.

        Without any, or unless they are to be kept, everything that this run created is removed. Does nothing after
        `publish`.
        """
        for shard in self._active.values():
            shard.discard()
        self._active.clear()
        state, self._state = self._state, None
        if state is not None and state.finished and keep:
            self._created.clear()
            self._release()
            return
        self._remove_work(state)
        while self._created:
            try:
                self._created.pop().rmdir()
            except OSError:  # somebody else has put something there since
                self._created.clear()

    def _own_state(self) -> State:
        if self._state is None:
            raise _internal(f"{self.path}: the output directory is not open")
        return self._state

    def _create_directory(self) -> None:
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise OutputError(f"{self.path}: is a file; give a directory")
        with os_errors(self.path, "creating the directory"):
            for folder in [*reversed(self.path.parents), self.path]:
                if not os.path.exists(folder):
                    folder.mkdir()
                    self._created.append(folder)
                    fsync_directory(folder.parent)

    def _check_claim(self) -> State | None:
        return check_claim(self.path, self.identity, self._contents.files, overwrite=self.overwrite)

    def _check_space(self, files: Sequence[str], reclaimed: int) -> None:
        needed = sum(self._contents.size(file) for file in files) + self._copied
        with os_errors(self.path, "asking for free space"):
            free = free_bytes(self.path) + reclaimed
        if needed > free:
            raise OutputError(
                f"{self.path}: not enough space: needs {needed:,} bytes, {free:,} bytes free; "
                "free some space or choose another disk"
            )

    def _finish_empty(self, layout: ShardLayout) -> None:
        """A file of empty tensors only is finished as it is: nothing is going to be written."""
        if layout.nbytes == len(layout.header):
            self._finish(layout)

    def _finish(self, layout: ShardLayout) -> None:
        state = self._own_state()
        shard = self._active.get(layout.file)
        if shard is None:
            shard = self._shard_file(layout)
        state.finished[layout.file] = shard.finish(self._work / work_name(layout.file))
        self._active.pop(layout.file, None)
        state.save(self._work)
        event("shard_finished", f"{layout.file}: finished", level=logging.DEBUG, file=layout.file, bytes=layout.nbytes)

    def _shard_file(self, layout: ShardLayout) -> ShardFile:
        return ShardFile(layout, self._work / partial_name(layout.file), keeps_cache=self.keeps_cache)

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

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # may be done twice: a signal may come before the next line
            self._lock = None
