"""Files of an output: allowed names, atomic replacement, what does not belong to us, useful disk errors."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pymerge.errors import CheckpointError, OutputError

WORK_FOLDER = ".pymerge"
STATE_NAME = "state.json"
MANIFEST_NAME = "pymerge_manifest.json"

_COPY_BYTES = 16 << 20


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of an existing directory."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def output_error(path: Path, action: str, error: OSError, needed: int | None = None) -> OutputError:
    """An OutputError for a failed system call, with sizes and remedy where the disk or a limit is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wanted = "" if needed is None else f" needs {needed:,} bytes,"
        free = free_bytes(next(parent for parent in path.absolute().parents if parent.is_dir()))
        return OutputError(
            f"{path}: no space left:{wanted} {free:,} bytes free; free some space and run the same command again"
        )
    if error.errno == errno.EFBIG:
        wanted = "" if needed is None else f" of {needed:,} bytes"
        return OutputError(
            f"{path}: a file{wanted} is not allowed here (file system or `ulimit -f`); "
            "give a smaller maximum shard size or raise the limit"
        )
    return OutputError(f"{path}: {action} failed ({error.strerror}); check the directory and its rights")


@contextmanager
def os_errors(path: Path, action: str) -> Iterator[None]:
    """Turn the OSErrors of a block into OutputError."""
    try:
        yield
    except OSError as error:
        raise output_error(path, action, error) from error


def fsync_directory(path: Path | str) -> None:
    """Make renames and new names in a directory survive a power cut. Raises OutputError."""
    path = Path(path)
    with os_errors(path, "syncing the directory"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename, fsync. Raises OutputError."""
    path = Path(path)
    install(data, path, path.with_name(f".{path.name}.{os.getpid()}.tmp"))


def install(source: bytes | Path, target: Path, temporary: Path, sha256: str | None = None) -> None:
    """Put bytes or a copy of a file at `target`, whole or not at all, by way of `temporary` beside it.

    With `sha256` given, a source that differs from it raises CheckpointError. Raises OutputError when
    writing fails.
    """
    digest = hashlib.sha256()
    try:
        with os_errors(target, "writing"):
            with open(temporary, "wb") as stream:
                for piece in _pieces(source):
                    digest.update(piece)
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CheckpointError(f"{source!s}: changed while the merge ran; run the same command again")
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def size_and_digest(source: bytes | Path) -> tuple[int, str]:
    """Length and sha256 (hex) of bytes or of a file. Raises CheckpointError when the file cannot be read."""
    digest = hashlib.sha256()
    size = 0
    for piece in _pieces(source):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


def _pieces(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    try:
        with open(source, "rb") as stream:
            while piece := stream.read(_COPY_BYTES):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror}); check the file") from error


def is_safe_name(name: object) -> bool:
    """Whether a name stays inside the output directory and outside our work folder."""
    if not isinstance(name, str) or "\0" in name or "\\" in name:
        return False
    parts = name.split("/")
    return not set(parts) & {"", ".", ".."} and parts[0] != WORK_FOLDER


def foreign_entries(root: Path, own: Collection[str]) -> Iterator[str]:
    """Relative names under `root`, sorted, that are not in `own`; folders without anything of ours by name.

    The work folder at the top is left out. A link to a folder is never followed: what lies behind it is not
    ours.
    """
    folders = {parent.as_posix() for name in own for parent in Path(name).parents}

    def walk(folder: str) -> Iterator[str]:
        with os.scandir(root / folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if name in folders:
                    yield from walk(name)
                elif name != WORK_FOLDER:
                    yield name
            elif name not in own:
                yield name

    yield from walk("")
