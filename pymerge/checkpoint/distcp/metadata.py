"""The .metadata of a checkpoint of torch.distributed.checkpoint: which tensors it has, and where their chunks lie.

It is a pickle. Nothing of it is unpickled: `read_pickle` reads what it says of the classes below, whose code never
runs, and every value is checked before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pymerge.checkpoint.safetensors_file import AGAIN, MAX_ELEMENTS, MAX_HEADER_BYTES
from pymerge.checkpoint.torch_pickle import Global, Opaque, Record, RefusedPickle, read_pickle
from pymerge.common.files import opened, read_exactly
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_CLASSES = "torch.distributed.checkpoint.metadata."
_METADATA = f"{_CLASSES}Metadata"
_TENSOR = f"{_CLASSES}TensorStorageMetadata"
_BYTES = f"{_CLASSES}BytesStorageMetadata"
_PROPERTIES = f"{_CLASSES}TensorProperties"
_CHUNK = f"{_CLASSES}ChunkStorageMetadata"
_INDEX = f"{_CLASSES}MetadataIndex"
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_RECORDS = frozenset({_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX, _PLACE, f"{_CLASSES}StorageMeta"})
_LONGEST_PATH = 100


class Chunk(NamedTuple):
    """A box of a tensor: where it begins in it, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class SavedTensor(NamedTuple):
    """A tensor of a checkpoint by its whole shape, and the chunks that processes wrote of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Place(NamedTuple):
    """Bytes of a file that hold what one torch.save wrote."""

    file: str
    offset: int
    nbytes: int


class Metadata(NamedTuple):
    """Content of a .metadata: tensors by their key; the path of each key in the nested dictionaries that were saved;
    places by key and first element of the chunk; stamp of the file, and its size."""

    tensors: dict[str, SavedTensor]
    paths: dict[str, tuple[str, ...]]
    places: dict[tuple[str, tuple[int, ...]], Place]
    stamp: tuple[int, int]


def read_metadata(path: Path) -> Metadata:
    """Read and check a .metadata. Raises CheckpointError."""
    with opened(path, "PyTorch") as (descriptor, status):
        if status.st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: has {status.st_size} bytes, more than {MAX_HEADER_BYTES}; {AGAIN}")
        data = read_exactly(descriptor, status.st_size, 0)
    try:
        found = read_pickle(data, _RECORDS)
    except RefusedPickle as error:
        raise _foreign(path, str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged or no .metadata of a checkpoint ({error}); {AGAIN}") from error
    state = _state(path, found, _METADATA, "its content")
    saved = _dictionary(path, state.get("state_dict_metadata"), "its list of entries")
    tensors: dict[str, SavedTensor] = {}
    for key, value in saved.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: has an entry without a name; {AGAIN}")
        if not (isinstance(value, Record) and value.name == _BYTES):
            tensors[key] = _tensor(f"{path}: entry {shorten(key)}", value)
    mapping = state.get("planner_data")
    named = {} if mapping is None else _dictionary(path, mapping, "its paths of entries")
    paths = {key: _path(path, key, named.get(key, (key,))) for key in saved}
    return Metadata(tensors, paths, _places(path, state.get("storage_data")), (status.st_size, status.st_mtime_ns))


def _state(where: Path | str, value: Any, name: str, what: str) -> Mapping[Any, Any]:
    """The state of a record of this class. Raises CheckpointError, which names what is there instead."""
    if isinstance(value, Opaque) or (isinstance(value, Record) and value.name != name):
        raise _foreign(where, value.name)
    if not isinstance(value, Record) or not isinstance(value.state, dict):
        raise CheckpointError(f"{where}: {what} is no {name.rpartition('.')[2]}; {AGAIN}")
    return value.state


def _foreign(where: Path | str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: holds {shorten(name)}, which is no class of a checkpoint by torch.distributed.checkpoint, and "
        "pymerge runs no code of a file; load it where it was made, and save the model's state_dict with "
        "torch.distributed.checkpoint.save, or as safetensors"
    )


def _dictionary(path: Path, value: Any, what: str) -> dict[Any, Any]:
    if isinstance(value, (Opaque, Record)):
        raise _foreign(path, value.name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is no dictionary; {AGAIN}")
    return value


def _tensor(where: str, value: Any) -> SavedTensor:
    state = _state(where, value, _TENSOR, "it")
    properties, chunks = state.get("properties"), state.get("chunks")
    fields = properties.state if isinstance(properties, Record) and properties.name == _PROPERTIES else None
    dtype = fields[0] if isinstance(fields, tuple) and fields else None  # its class has a state of its own
    found = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(found, torch.dtype) or not isinstance(chunks, list):
        raise CheckpointError(f"{where}: has no dtype, or no chunks; {AGAIN}")
    shape = _sizes(where, state.get("size"))
    boxes = []
    for each in chunks:
        box = _state(where, each, _CHUNK, "a chunk of it")
        offsets, sizes = _sizes(where, box.get("offsets")), _sizes(where, box.get("sizes"))
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(first + size > whole for first, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{where}: a chunk at {list(offsets)} lies outside its shape {list(shape)}; {AGAIN}")
        boxes.append(Chunk(offsets, sizes))
    return SavedTensor(found, shape, tuple(boxes))


def _path(path: Path, key: str, value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, (tuple, list)) else ()
    if not 0 < len(parts) <= _LONGEST_PATH or not all(type(part) in (str, int) for part in parts):
        raise CheckpointError(f"{path}: entry {shorten(key)} has no path; {AGAIN}")
    return tuple(map(str, parts))


def _places(path: Path, value: Any) -> dict[tuple[str, tuple[int, ...]], Place]:
    """The places of all chunks, and of what is no tensor under an empty offset."""
    found: dict[tuple[str, tuple[int, ...]], Place] = {}
    for index, place in _dictionary(path, value, "its list of places").items():
        key = _state(path, index, _INDEX, "a place's key")
        name = key.get("fqn")
        where = f"{path}: entry {shorten(str(name))}"
        offset = key.get("offset")
        state = _state(where, place, _PLACE, "its place")
        file = state.get("relative_path")
        # Files lie beside the .metadata: any other name is one that somebody else chose.
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")
        start, nbytes = _sizes(where, (state.get("offset"), state.get("length")))
        if not isinstance(name, str) or not isinstance(file, str) or not plain:
            raise CheckpointError(
                f"{where}: is in {shorten(str(file))}, which is not the plain name of a file in this directory; do "
                "not use this checkpoint, copy it again"
            )
        if state.get("transform_descriptors"):
            kinds = state["transform_descriptors"]
            named = ", ".join(map(str, kinds)) if isinstance(kinds, (list, tuple)) else str(kinds)
            raise CheckpointError(
                f"{where}: is stored by an extension ({shorten(named)}), which pymerge cannot undo; save it without "
                "extensions"
            )
        found[name, () if offset is None else _sizes(where, offset)] = Place(file, start, nbytes)
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_ELEMENTS


def _sizes(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(map(_is_size, value)):
        raise CheckpointError(f"{where}: has no sizes where its shape and places should be; {AGAIN}")
    return tuple(value)
