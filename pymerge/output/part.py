"""An output directory that several processes write at once, each the files of its part, until a run publishes all."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pymerge.common.files import install, os_errors
from pymerge.output.claim import State
from pymerge.output.contents import find_whole
from pymerge.output.held import NOTE, HeldDirectory
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout
from pymerge.output.lock import acquire_lock, change_lock, in_use
from pymerge.output.records import load_records
from pymerge.output.work import NOTE_NAME, temporary


class PartDirectory(HeldDirectory):
    """An output directory whose lock this process shares, between `open` and `abandon`, to write `files` of it.

    `layouts`, `beside` and `identity` are those of the whole merge, as an `OutputDirectory` has them; `parts` is the
    number of parts that it is run in, 0 if it is not known. Two processes may write the same file: they make the same
    bytes, and the later one replaces what the other has made.
    """

    def __init__(
        self,
        path: Path | str,
        layouts: Sequence[ShardLayout],
        files: Collection[str],
        *,
        identity: Identity,
        beside: Sequence[ShardLayout] = (),
        parts: int = 0,
        keeps_cache: bool = True,
    ) -> None:
        super().__init__(path, layouts, identity, beside, {}, {}, keeps_cache)
        self._files = [file for file in self._contents.files if file in files]
        self._parts = parts

    def __enter__(self) -> PartDirectory:
        if self._lock is None:
            self.open()
        return self

    @property
    def missing(self) -> list[str]:
        """Files of the whole merge that nobody has recorded as finished."""
        found = self._finished()
        return [file for file in self._contents.files if file not in found]

    def open(self) -> PartDirectory:
        """Share the directory: create, lock, check, keep what is whole, and check the space for the other files.

        Raises OutputError as an `OutputDirectory` does; runs that share the lock are no others.
        """
        try:
            self._create_directory()
            if self._work.is_symlink() or not os.path.exists(self._work):
                self._check_claim(False, part=True)  # before anything is changed
            self._lock = acquire_lock(self.path, shared=True)
            state = self._check_claim(False, part=True)
            if state is None:
                self._check_space(self._files)
                State(self.identity, self._contents.files, self._parts).create(self._work)
                state = self._check_claim(False, part=True)  # what is there now may be another part's
            if state is None:
                raise in_use(self.path)
            if self._parts not in (0, state.parts):
                state = replace(state, parts=self._parts)
                state.save(self._work)
            install(NOTE, self._work / NOTE_NAME, temporary(self._work))
            with os_errors(self._work, "resuming"):
                records = load_records(self._work, self._files, self._digest)
                self._own(state, find_whole(self.path, self._contents, self._files, state.publishing, records))
            unfinished = [file for file in self._files if file not in self.finished]
            self._check_space(unfinished)
            self._own_sink().finish_empty(unfinished)
        except BaseException:
            self.abandon()
            raise
        return self

    def abandon(self) -> None:
        """Stop writing. What is whole is kept; where nobody has finished anything, all is as it was before."""
        if self._sink is not None:
            self._sink.discard()
        wrote = bool(self._sink and self._sink.finished)
        state, self._state, self._sink = self._state, None, None
        lock = None if wrote else self._lock
        if lock is not None and not lock.closed and change_lock(lock, self.path, shared=False) and not self._finished():
            self._remove_work(state)
        self._release()
        if wrote:
            self._created.clear()
        self._remove_created()

    def _finished(self) -> Collection[str]:
        """Files of the whole merge that have a record."""
        return load_records(self._work, self._contents.files, self._digest)
