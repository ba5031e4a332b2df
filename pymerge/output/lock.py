"""Lock on an output directory: held by one run alone, or shared by those that each write other files of one merge."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from io import FileIO
from pathlib import Path

from pymerge.common.files import output_error
from pymerge.errors import OutputError
from pymerge.output.files import WORK_FOLDER
from pymerge.output.work import LOCK_NAME

_TRIES = 10  # of runs that end and remove the folder while we lock it
# How long who would share a lock waits for another one that holds it alone, maybe only to clear up after itself.
_PATIENCE = 1.0


class InUseError(OutputError):
    """Another run writes to the output directory."""


def in_use(path: Path) -> InUseError:
    """The error where another run writes to this output directory."""
    return InUseError(f"{path}: another pymerge run is writing here; wait for it or choose another directory")


def acquire_lock(path: Path, *, shared: bool = False) -> FileIO:
    """Make the work folder of an output directory and lock it; the lock lasts until the file is closed.

    Raises InUseError when another run holds it, and OutputError when the file system has no locks.
    """
    lock = path / WORK_FOLDER / LOCK_NAME
    deadline = time.monotonic() + (_PATIENCE if shared else 0.0)
    tries = 0
    while tries < _TRIES:
        try:
            lock.parent.mkdir(exist_ok=True)
            file = FileIO(lock, "a+")
        except FileNotFoundError:  # a run that just ended has removed the folder
            tries += 1
            continue
        except OSError as error:
            raise output_error(lock, "creating the lock", error) from error
        if not _flock(file, path, shared):
            file.close()
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
            continue
        if _is_current(file, lock):
            return file
        file.close()
        tries += 1
    raise in_use(path)


def change_lock(file: FileIO, path: Path, *, shared: bool) -> bool:
    """Share a lock that was held alone, or the other way round; whether it is ours. If not, none is held any more.

    Raises OutputError when the file system has no locks.
    """
    return _flock(file, path, shared) and _is_current(file, path / WORK_FOLDER / LOCK_NAME)


def _flock(file: FileIO, path: Path, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        file.close()
        raise OutputError(
            f"{path / WORK_FOLDER / LOCK_NAME}: file locks do not work here ({error.strerror}); write to another file "
            "system"
        ) from error
    return True


def _is_current(file: FileIO, lock: Path) -> bool:
    """Whether the locked file is still there: a run that just ended may have removed it before our lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
    except FileNotFoundError:
        return False
