"""The step that turns finished shards in the work folder into a visible model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.common.files import fsync_directory, install, os_errors
from pymerge.errors import OutputError
from pymerge.output.files import MANIFEST_NAME, WORK_FOLDER, is_safe_name
from pymerge.output.layout import ShardLayout, index_json, index_name
from pymerge.output.manifest import manifest_bytes
from pymerge.output.work import temporary, work_name

_CONFIG = "config.json"
_WRITTEN_BY_US = (_CONFIG, "README.md")


def check_names(
    path: Path, layouts: Sequence[ShardLayout], beside: Sequence[ShardLayout], files: Mapping[str, bytes | Path]
) -> list[str]:
    """Names of everything that publishing puts into `path`, sorted.

    Raises OutputError for a name outside the directory, one that is written here anyway, and a copied file
    that would stand in for the config or model card of the merge.
    """
    index = index_name(layouts)
    own = [layout.file for layout in (*layouts, *beside)] + [MANIFEST_NAME] + ([index] if index is not None else [])
    for name, source in files.items():
        if not is_safe_name(name):
            raise OutputError(f"{path}: {name!r} is no relative file name inside the output; leave it out")
        if name in own or (isinstance(source, Path) and name in _WRITTEN_BY_US):
            raise OutputError(f"{path}: {name} would replace the one that pymerge writes; do not copy it")
    return sorted([*own, *files])


def publish_files(
    path: Path,
    layouts: Sequence[ShardLayout],
    beside: Sequence[ShardLayout],
    files: Mapping[str, bytes | Path],
    manifest: Mapping[str, Any],
    last: str | None = None,
) -> None:
    """Move the shards and write the other files, each one atomically; what makes it a model comes last."""
    index = index_name(layouts)
    _move_shards(path, beside)
    if index is not None:
        _move_shards(path, layouts)
    recorded = manifest.get("files", {})

    def put(name: str) -> None:
        _put(path, name, files[name], recorded.get(name, {}).get("sha256"))

    for name in sorted(files.keys() - {last}, key=lambda name: (name == _CONFIG, name)):
        put(name)
    _put(path, MANIFEST_NAME, manifest_bytes(manifest))
    if index is not None:
        _put(path, index, index_json(layouts))
    else:
        _move_shards(path, layouts)
    if last is not None:
        put(last)


def _move_shards(path: Path, layouts: Sequence[ShardLayout]) -> None:
    for layout in layouts:
        source, target = path / WORK_FOLDER / work_name(layout.file), path / layout.file
        with os_errors(target, "moving the shard"):
            if source.exists():  # otherwise an earlier, interrupted publish has moved it
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
        if target.parent != path:
            _sync_folders(path, target)
    fsync_directory(path)


def _sync_folders(path: Path, target: Path) -> None:
    for parent in target.relative_to(path).parents:
        fsync_directory(path / parent)


def _put(path: Path, name: str, source: bytes | Path, sha256: str | None = None) -> None:
    target = path / name
    with os_errors(target, "creating the folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
    install(source, target, temporary(path / WORK_FOLDER), sha256)
    _sync_folders(path, target)
