"""Write an output directory: shards at planned offsets, resume after a kill, visible only when all is whole.

Until `publish`, everything lies in the hidden folder `.pymerge` of the output, so that nothing takes a
half-written directory for a model:

    OUT/.pymerge/lock                  held (flock) by the run that writes here, or shared by the parts that do
    OUT/.pymerge/state.json            whose merge this is
    OUT/.pymerge/<shard>.*.partial     being written by some process, at full size from the start
    OUT/.pymerge/<shard>               whole, synced
    OUT/.pymerge/<shard>.json          its record, which comes after it: its tensors' checksums
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.common.files import install, os_errors
from pymerge.errors import OutputError
from pymerge.output.claim import State, earlier_bytes, load_state, remove_earlier, remove_partial
from pymerge.output.contents import find_present, find_whole, places
from pymerge.output.held import NOTE, HeldDirectory
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout
from pymerge.output.lock import acquire_lock, change_lock, in_use
from pymerge.output.manifest import load_manifest
from pymerge.output.publish import check_names, publish_files
from pymerge.output.records import Record, load_records
from pymerge.output.sink import internal
from pymerge.output.work import NOTE_NAME, record_name, temporary, work_name


class OutputDirectory(HeldDirectory):
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
        super().__init__(path, layouts, identity, beside, late or {}, interim or {}, keeps_cache)
        self.overwrite = overwrite
        self._copied = copied
        self._adopted = self._shared = False

    def __enter__(self) -> OutputDirectory:
        if self._lock is None:
            self.open()
        return self

    @property
    def beside(self) -> tuple[ShardLayout, ...]:
        """Layouts of the files that are not the model's, in their order; of late ones those that are settled."""
        return self._contents.beside

    def place_of(self, file: str) -> Path:
        """Path of an interim file that is finished, until `publish`."""
        return self._work / work_name(file)

    @property
    def checksums(self) -> dict[str, dict[str, str]]:
        """Digest (hex) of every tensor of the finished shards: file -> tensor -> digest."""
        return {file: dict(record.tensors) for file, record in self._own_sink().finished.items()}

    @property
    def missing(self) -> list[str]:
        """Files that are not whole."""
        finished = self._own_sink().finished
        return [file for file in self._contents.files if file not in finished]

    @property
    def parts(self) -> int:
        """Number of parts in which the merge was last run; 0 if it was not."""
        return self._own_state().parts

    def open(self) -> OutputDirectory:
        """Take the directory: create, lock, check, resume or clear it, and check the disk space.

        Raises OutputError when it is a file, is in use by another run, holds anything that is not of this
        merge, or when the disk is too full; the directory is then as it was before.
        """
        try:
            self._create_directory()
            if self._work.is_symlink() or not os.path.exists(self._work):
                self._check_claim(self.overwrite)  # before anything is changed
            self._lock = acquire_lock(self.path)
            state = self._check_claim(self.overwrite)
            if state is None:
                self._check_space(self._contents.files, self._copied, earlier_bytes(self.path))
                remove_earlier(self.path)
                state = State(self.identity, self._contents.files)
                state.save(self._work)
            self._own(state, {})
            install(NOTE, self._work / NOTE_NAME, temporary(self._work))
            with os_errors(self._work, "resuming"):
                remove_partial(self._work, state)
                records = load_records(self._work, self._contents.files, self._digest)
                self._take(find_whole(self.path, self._contents, self._contents.files, state.publishing, records))
            self._check_space(self.missing, self._copied)
            self._own_sink().finish_empty(self.missing)
        except BaseException:
            self.abandon()
            raise
        return self

    def adopt(self, *, verify: bool | None = None) -> OutputDirectory:
        """Take a directory that parts of this merge have written, to publish it; nothing is created.

        Files that are no longer as recorded, by size and header, are `missing`. With `verify`, their checksums count
        too: by default where several machines have written.

        Raises OutputError when there are no parts of this merge, or when one is being written.
        """
        if load_state(self._work) is None:
            if load_manifest(self.path) is not None:
                self._check_claim(False, part=True)  # says in what the merge differs that is there
            raise OutputError(
                f"{self.path}: holds no part of a merge; run the parts first (pymerge merge CONFIG OUT --part 1/N, ...)"
            )
        self._lock = acquire_lock(self.path)
        try:
            state = self._check_claim(False, part=True)
            if state is None:  # published, or removed, before it was locked
                raise in_use(self.path)
            self._adopted = True
            self._own(state, {})
            self._gather(verify)
        except BaseException:
            self.abandon()
            raise
        return self

    def share(self) -> None:
        """Let other processes write parts of this merge from now on; `reclaim` ends that.

        Raises OutputError when another run was quicker.
        """
        assert self._lock is not None
        if not change_lock(self._lock, self.path, shared=True):
            raise in_use(self.path)
        self._shared = True

    def reclaim(self, *, verify: bool | None = None) -> None:
        """Take the directory back, with what other processes have written, as `adopt` does.

        Raises OutputError when one of them is still writing.
        """
        assert self._lock is not None
        if not change_lock(self._lock, self.path, shared=False):
            raise in_use(self.path)
        self._shared = False
        self._own(load_state(self._work) or self._own_state(), {})
        self._gather(verify)

    def publish(
        self, files: Mapping[str, bytes | Path], manifest: Mapping[str, Any], *, last: str | None = None
    ) -> None:
        """Make the output visible: shards, `files` (name -> content, or a file to copy), manifest, index.

        Names are relative, with "/". What makes the directory a model (the index, or the single weight file)
        comes last, and after it only the file named `last`, if there is one. After a kill in between, opening the
        same merge and publishing again completes it. Raises OutputError when a shard is unfinished, a name is not
        allowed or writing fails, and CheckpointError when a file to be copied is not what the manifest says.
        """
        unfinished = self.missing
        if unfinished:
            raise internal(f"{self.path}: {len(unfinished)} shards are unfinished, {unfinished[0]} among them")
        names = check_names(self.path, self.layouts, self.beside, files)
        self._state = state = replace(self._own_state(), publishing=names)
        state.save(self._work)
        publish_files(self.path, self.layouts, self.beside, files, manifest, last)
        self._state = self._sink = None
        self._created.clear()
        self._remove_work(state)

    def abandon(self, *, keep: bool = True) -> None:
        """Stop writing. Finished shards are kept for the next run, beside a note how to go on.

        Without any, or unless they are to be kept, everything that this run created is removed. Does nothing after
        `publish`.
        """
        if self._sink is not None:
            self._sink.discard()
        kept = keep and (self._adopted or self._others_wrote() or bool(self._sink and self._sink.finished))
        state, self._state, self._sink = self._state, None, None
        if state is not None and kept:
            self._created.clear()
            self._release()
            return
        self._remove_work(state)
        self._remove_created()

    def _others_wrote(self) -> bool:
        """Whether there may be files of processes that share the directory."""
        if not self._shared or self._lock is None:
            return False
        alone = change_lock(self._lock, self.path, shared=False)
        return not alone or bool(load_records(self._work, self._contents.files, self._digest))

    def _gather(self, verify: bool | None) -> None:
        """Take the files that have records of this merge."""
        publishing = self._own_state().publishing
        with os_errors(self._work, "looking at the parts"):
            found = load_records(self._work, self._contents.files, self._digest)
            if verify is None:
                verify = len({record.host for record in found.values()}) > 1
            if verify:
                found = find_whole(self.path, self._contents, self._contents.files, publishing, found)
            else:
                found = find_present(self.path, self._contents, publishing, found)
            self._take(found)

    def _take(self, whole: dict[str, Record]) -> None:
        """Take these files as finished, and remove the others and their records. Raises OSError."""
        self._own_sink().finished = whole
        for file in self._contents.files:
            if file not in whole:
                (self._work / record_name(file)).unlink(missing_ok=True)
                for place in places(self.path, file, self._own_state().publishing):
                    place.unlink(missing_ok=True)
