"""Names in an output directory: our own files, those that are allowed, and those that do not belong to us."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

WORK_FOLDER = ".pymerge"
STATE_NAME = "state.json"
MANIFEST_NAME = "pymerge_manifest.json"


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
