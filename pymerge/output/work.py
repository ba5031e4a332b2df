"""Names in the work folder of an output directory, and which of what lies there is ours."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from pymerge.output.files import STATE_NAME

LOCK_NAME = "lock"
NOTE_NAME = "UNFINISHED.txt"
NORMS_NAME = "norms.json"  # of what the merge adds to each layer, where their scales follow from them
_TEMPORARY = "temporary"
# name.host.process.random: several processes may write the same shard.
_PARTIAL = re.compile(r"(.+)\.([^.]+)\.[0-9]+\.[0-9a-f]{8}\.partial")


def work_name(shard: str) -> str:
    """Name of a shard in the work folder, which has no folders: those of the shard become part of its name."""
    return shard.replace("/", "%")


def record_name(shard: str) -> str:
    """Name of the record of a shard that is whole."""
    return f"{work_name(shard)}.json"


def partial_name(shard: str) -> str:
    """Name for a shard that is still being written, which no other process gives."""
    return f"{work_name(shard)}.{host()}.{os.getpid()}.{secrets.token_hex(4)}.partial"


def temporary(work: Path) -> Path:
    """Path for a small file before it is renamed, which no other process has."""
    return work / partial_name(_TEMPORARY)


@cache
def host() -> str:
    """Name of this machine, as far as file names can have it."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "-"


class WorkNames:
    """Names that a work folder may hold, for the shards of a merge."""

    def __init__(self, shards: Iterable[str]) -> None:
        shards = list(shards)
        self.whole = {work_name(shard) for shard in shards}
        self.fixed = {LOCK_NAME, NOTE_NAME, NORMS_NAME, STATE_NAME, *self.whole, *map(record_name, shards)}

    def __contains__(self, name: str) -> bool:
        return name in self.fixed or self.is_partial(name)

    def is_partial(self, name: str) -> bool:
        """Whether a name is one of a file that some process has not finished."""
        found = _PARTIAL.fullmatch(name)
        return found is not None and (found[1] == _TEMPORARY or found[1] in self.whole)


def remove_stale(work: Path, shard: str) -> None:
    """Remove what processes of this machine that are no more have left of a shard: they locked it. Raises OSError."""
    for name in os.listdir(work):
        found = _PARTIAL.fullmatch(name)
        if found is None or found[1] != work_name(shard) or found[2] != host():
            continue
        with suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(work / name, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (work / name).unlink(missing_ok=True)
            finally:
                os.close(descriptor)
