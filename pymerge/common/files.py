"""Files: plain ones read whole, JSON that is checked, writes that happen entirely or not at all, useful disk errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymerge.common.names import shorten
from pymerge.errors import CheckpointError, OutputError

_MAX_TEXT_BYTES = 100_000_000  # of a JSON file
_COPY_BYTES = 16 << 20


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {shorten(key)} occurs twice")
            seen.add(key)
    return found


def _integer(text: str) -> int | float:
    """Whole numbers as safetensors reads them: to its parser, -0 is a float."""
    return -0.0 if text == "-0" else int(text)


def parse_json_object(data: bytes, *, unique: bool) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object; `unique` refuses repeated names. Raises ValueError."""
    try:
        # ValueError also covers bad UTF-8 and integers of thousands of digits.
        hook = _no_duplicates if unique else None
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook, parse_int=_integer)
        if b"\\u" in data:  # an escape can be half of a surrogate pair, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{shorten(error.object[error.start : error.end])} is not valid Unicode") from None
    if not isinstance(value, dict):
        raise ValueError(f"its top level is a {type(value).__name__}, not an object")
    return value


def read_exactly(descriptor: int, nbytes: int, offset: int) -> bytes:
    """`nbytes` bytes from `offset` on, fewer only at the end of the file. Raises OSError."""
    parts = []
    while nbytes > 0:
        part = os.pread(descriptor, min(nbytes, 1 << 26), offset)
        if not part:
            break
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open a plain file for reading. Raises OSError, also for FIFOs, devices and directories."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer; it has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def read_text_file(path: Path) -> bytes:
    """The whole of a JSON file. Raises OSError, also for what is no plain file; ValueError if it is too large."""
    descriptor, status = open_regular(path)
    try:
        if status.st_size > _MAX_TEXT_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than the {_MAX_TEXT_BYTES} that are read")
        return read_exactly(descriptor, status.st_size, 0)
    finally:
        os.close(descriptor)


@contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[int, os.stat_result]]:
    """Descriptor and status of a regular file, for reading what it says about itself.

    Raises CheckpointError when it cannot be opened or is not a regular file, and for each OSError of the block.
    """
    try:
        descriptor, status = open_regular(path)
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "check its rights" if denied else f"give a {kind} file"
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); {remedy}") from error
    try:
        yield descriptor, status
    except OSError as error:
        raise CheckpointError(f"{path}: reading the header failed ({error.strerror}); check the disk") from error
    finally:
        os.close(descriptor)


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
            "raise the limit, or, for the weights of a model, give a smaller maximum shard size"
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
