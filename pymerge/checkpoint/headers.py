"""Open a checkpoint from its headers alone: which tensors it has, and where each one lies."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.carried import WEIGHT_SUFFIXES, carried_files, is_weight_file
from pymerge.checkpoint.fileformat import (
    Header,
    TensorEntry,
    first_few,
    parse_json_object,
    read_header,
    read_text_file,
    shorten,
)
from pymerge.errors import CheckpointError

__all__ = ["Checkpoint", "Header", "TensorEntry", "open_checkpoint", "read_header"]

_SINGLE = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONVERT = "convert it with transformers (from_pretrained, then save_pretrained, which writes safetensors)"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `files` are the weight files sorted by name; `tensors` are in the order of files and offsets;
    `other_files` are relative to `path`; `stamps` maps each weight file to its (size, mtime_ns) when its
    header was read.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    other_files: tuple[Path, ...]
    stamps: dict[Path, tuple[int, int]]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face model directory or a single .safetensors file, reading headers only.

    A directory holds `model.safetensors`, or an index with its shards, or exactly one .safetensors file; when
    several are there the order is this one, which is that of transformers. A single file has no config and no
    other files. Raises CheckpointError, with what was found and what to do, for anything else.
    """
    given = str(path)
    path = Path(path).expanduser()
    if os.path.isdir(path):  # not Path.is_dir, which raises OSError for names that are too long
        return _open_directory(path)
    if not os.path.exists(path):
        raise CheckpointError(_missing(given))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: is neither a directory nor a .safetensors file; {_CONVERT}")
    header = read_header(path)
    stamps = {path: (header.file_bytes, header.mtime_ns)}
    return Checkpoint(path, (path,), header.entries, {}, (), stamps)


def _missing(given: str) -> str:
    if _HUB_ID.fullmatch(given):
        return (
            f"{given}: no such directory here; it looks like a Hugging Face Hub id, and pymerge does not "
            f"download models; run `hf download {given} --local-dir DIR` and give DIR"
        )
    return f"{given}: no such file or directory; give a model directory or a .safetensors file"


def _open_directory(path: Path) -> Checkpoint:
    weight_files, index = _find_weights(path)
    headers = {file: read_header(file) for file in weight_files}
    if index is not None:
        _check_index(path / index, headers)
    tensors = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    stamps = {file: (header.file_bytes, header.mtime_ns) for file, header in headers.items()}
    return Checkpoint(path, weight_files, tensors, _read_config(path), carried_files(path), stamps)


def _find_weights(path: Path) -> tuple[tuple[Path, ...], str | None]:
    """The weight files, sorted, and the name of the index that lists them (None without one)."""
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); check its rights") from error
    if _SINGLE in names:
        return (path / _SINGLE,), None
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if "model" + _INDEX_SUFFIX in indexes:
        indexes = ["model" + _INDEX_SUFFIX]
    if len(indexes) > 1:
        raise CheckpointError(f"{path}: has several indexes ({first_few(indexes)}); keep the one to be merged")
    if indexes:
        shards = sorted(set(_read_weight_map(path / indexes[0]).values()))
        absent = [shard for shard in shards if not os.path.isfile(path / shard)]
        if absent:
            raise CheckpointError(
                f"{path / indexes[0]}: shards are missing: {first_few(absent)}; download the missing files"
            )
        return tuple(path / shard for shard in shards), indexes[0]
    single = [name for name in names if name.endswith(".safetensors")]
    if len(single) == 1:
        return (path / single[0],), None
    if single:
        raise CheckpointError(
            f"{path}: has {len(single)} .safetensors files ({first_few(single)}) but no "
            f"model{_INDEX_SUFFIX}; download the index too, or give one of the files"
        )
    others = [name for name in names if is_weight_file(name)]
    if others:
        raise CheckpointError(f"{path}: has no .safetensors file, only {first_few(others)}; {_CONVERT}")
    raise CheckpointError(
        f"{path}: has no weights (no file ending in {', '.join(WEIGHT_SUFFIXES)}); give the directory of a model"
    )


def _read_json(path: Path, *, unique: bool) -> dict[str, Any]:
    try:
        return parse_json_object(read_text_file(path), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download the file again") from error


def _read_config(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    return _read_json(config, unique=False) if config.exists() else {}


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files; download the file again")
    for name, file in weight_map.items():
        # Only the name is checked: what it links to may lie elsewhere, as in the Hugging Face cache.
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {shorten(name)} is in {shorten(str(file))}, which is not the plain name of "
                "a .safetensors file in this directory; do not use this index, download it again"
            )
    return weight_map


def _check_index(index: Path, headers: dict[Path, Header]) -> None:
    """Raise CheckpointError unless index and shards name exactly the same tensors in the same files."""
    weight_map = _read_weight_map(index)
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in found:
                raise CheckpointError(
                    f"{index}: tensor {shorten(name)} is in two shards, {found[name]} and {file.name}; "
                    "remove the shard that is of another model"
                )
            found[name] = file.name
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{index}: does not list {first_few(unlisted)}, found in {found[unlisted[0]]}; "
            "download index and shards of the same revision"
        )
    wrong = [name for name, file in weight_map.items() if found.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{index}: {first_few(wrong)} should be in {weight_map[wrong[0]]} but "
            f"{'is in ' + found[wrong[0]] if wrong[0] in found else 'is in no shard'}; "
            "download index and shards of the same revision"
        )
